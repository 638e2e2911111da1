"""The documents that an answer used, as its ``regrad`` object, and a bounded memory of the latest ones."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from regrad_vllm.serve.routes import ID_PREFIXES

_MAX_HEADER_CHARS = 800  # one id of 256 bytes fits; all headers of an answer stay below 2 KiB


@dataclass(frozen=True, slots=True)
class UsedDocument:
    """One document whose gradient is in the adapter."""

    id: str
    version: int
    score: float
    weight: float  # w_k of its gradient in the adapter
    gradient_digest: str


@dataclass(frozen=True, slots=True)
class Used:
    """The documents and settings of one answer. ``reason`` explains the lack of an adapter, if there is none."""

    request_id: str
    namespace: str
    mode: str
    gamma: float
    documents: tuple[UsedDocument, ...] = ()
    adapter: str | None = None
    fallback: bool = False  # ReGrad was asked for and failed
    reason: str | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)  # retrieve, fetch, compose, slot_wait
    sequence: int | None = None  # the bank's last change that the documents reflect; None: the bank wasn't asked

    def as_json(self) -> dict[str, Any]:
        """The ``regrad`` object of an answer."""
        return {
            "request_id": self.request_id,
            "adapter": self.adapter,
            "namespace": self.namespace,
            "documents": [
                {
                    "id": document.id,
                    "version": document.version,
                    "score": round(document.score, 6),
                    "weight": round(document.weight, 6),
                    "gradient_digest": document.gradient_digest,
                }
                for document in self.documents
            ],
            "sequence": self.sequence,
            "gamma": self.gamma,
            "mode": self.mode,
            "fallback": self.fallback,
            "reason": self.reason,
            "timings_ms": {name: round(ms, 3) for name, ms in self.timings_ms.items()},
        }

    def json_bytes(self) -> bytes:
        return json.dumps(self.as_json(), separators=(",", ":")).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """x-regrad-adapter ("none" for the base model) and x-regrad-documents (ids, percent-encoded, with commas).

        Ids beyond 800 characters are left out and counted as "+N". The body has all ids.
        """
        ids = ""
        for index, document in enumerate(self.documents):
            shown = (", " if ids else "") + quote(document.id, safe="")
            if len(ids) + len(shown) > _MAX_HEADER_CHARS:
                ids += f", +{len(self.documents) - index}"
                break
            ids += shown
        return [(b"x-regrad-adapter", (self.adapter or "none").encode()), (b"x-regrad-documents", ids.encode())]


class UsedMemory:
    """The latest N requests by id. Older ones are forgotten. Used in one event loop."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_id: OrderedDict[str, Used] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, used: Used) -> None:
        self._by_id.pop(used.request_id, None)
        self._by_id[used.request_id] = used
        while len(self._by_id) > self._capacity:
            self._by_id.popitem(last=False)

    def get(self, request_id: str) -> Used | None:
        """A request by the id in its ``regrad`` object, or by the id of vLLM's answer. None if it is unknown."""
        for prefix in ("", *ID_PREFIXES):
            if request_id.startswith(prefix):
                found = self._by_id.get(request_id[len(prefix) :])
                if found is not None:
                    return found
        return None
