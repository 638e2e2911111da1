"""The documents that an answer used, as its ``regrad`` object, and a bounded memory of the latest ones."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from regrad_vllm.serve.seams.server_seams import ID_PREFIXES

# One id of 256 bytes fits, in percent-encoding. All headers of an answer stay below 2 KiB.
_MAX_DOCUMENTS_CHARS = 800
_MAX_ADAPTERS_CHARS = 240
_SHOWN_CHARS = 500  # of a query


@dataclass(frozen=True, slots=True)
class UsedDocument:
    """One document whose gradient is in the adapter."""

    id: str
    version: int
    score: float
    weight: float  # w_k of its gradient in the adapter
    gradient_digest: str


@dataclass(frozen=True, slots=True)
class UsedSentence:
    """One sentence that was put into the prompt, in mode cue."""

    document: str  # its id
    start: int  # place in the document's text, in characters
    end: int
    text: str
    score: float  # cosine of the sentence and the question


@dataclass(frozen=True, slots=True)
class Used:
    """The documents and settings of one answer. ``reason`` explains the lack of an adapter, or of the server's
    mode."""

    request_id: str
    namespace: str
    mode: str
    gamma: float
    documents: tuple[UsedDocument, ...] = ()
    cue: tuple[UsedSentence, ...] = ()  # nearest first, as in the prompt
    adapter: str | None = None
    fallback: bool = False  # ReGrad was asked for and failed
    reason: str | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)  # retrieve, fetch, resident
    query: str | None = None  # the text that was searched for, kept shortened; None: there was no search
    confidence: float | None = None  # in mode auto: of the first answer, 0 to 1
    sequence: int | None = None  # the bank's last change that the documents reflect; None: the bank wasn't asked

    def __post_init__(self) -> None:
        if self.query:
            object.__setattr__(self, "query", _shortened(self.query))

    def as_json(self) -> dict[str, Any]:
        """The ``regrad`` object of an answer."""
        return {
            "request_id": self.request_id,
            "adapter": self.adapter,
            "namespace": self.namespace,
            "query": self.query,
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
            "cue": [
                {
                    "document": sentence.document,
                    "start": sentence.start,
                    "end": sentence.end,
                    "text": sentence.text,
                    "score": round(sentence.score, 6),
                }
                for sentence in self.cue
            ],
            "sequence": self.sequence,
            "gamma": self.gamma,
            "mode": self.mode,
            "confidence": None if self.confidence is None else round(self.confidence, 6),
            "fallback": self.fallback,
            "reason": self.reason,
            "timings_ms": {name: round(ms, 3) for name, ms in self.timings_ms.items()},
        }

    def json_bytes(self) -> bytes:
        return json.dumps(self.as_json(), separators=(",", ":")).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """x-regrad-adapter and x-regrad-documents."""
        return _headers([self])


@dataclass(frozen=True, slots=True)
class UsedByPrompts:
    """The documents of one answer to several prompts, each of which has documents of its own."""

    request_id: str
    prompts: Sequence[Used]  # in the order of the request
    num_choices: int  # of each prompt

    @property
    def mode(self) -> str:
        """The mode that the request asked for. Single prompts may have gone back to blind."""
        return next((used.mode for used in self.prompts if used.mode != "blind"), "blind")

    def as_json(self) -> dict[str, Any]:
        """The ``regrad`` object of an answer: for each prompt its own, with the indices of its choices."""
        prompts = []
        for number, used in enumerate(self.prompts):
            choices = range(number * self.num_choices, (number + 1) * self.num_choices)
            own = {name: value for name, value in used.as_json().items() if name != "request_id"}
            prompts.append({"choices": list(choices), **own})
        return {"request_id": self.request_id, "prompts": prompts}

    def json_bytes(self) -> bytes:
        return json.dumps(self.as_json(), separators=(",", ":")).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """x-regrad-adapter and x-regrad-documents, with those of all prompts."""
        return _headers(self.prompts)


def _headers(prompts: Sequence[Used]) -> list[tuple[bytes, bytes]]:
    """The adapters ("none" for the base model), and the documents' ids, percent-encoded. Both with commas.

    Names that don't fit are left out and counted as "+N". The body has them all.
    """
    adapters = dict.fromkeys(used.adapter or "none" for used in prompts)
    ids = dict.fromkeys(quote(document.id, safe="") for used in prompts for document in used.documents)
    return [
        (b"x-regrad-adapter", _listed(adapters, _MAX_ADAPTERS_CHARS)),
        (b"x-regrad-documents", _listed(ids, _MAX_DOCUMENTS_CHARS)),
    ]


def _listed(names: Collection[str], max_chars: int) -> bytes:
    shown: list[str] = []
    for name in names:
        if len(", ".join([*shown, name])) > max_chars:
            shown.append(f"+{len(names) - len(shown)}")
            break
        shown.append(name)
    return ", ".join(shown).encode()


def _shortened(text: str) -> str:
    """A text of bounded length, with its beginning and its end."""
    half = _SHOWN_CHARS // 2
    return text if len(text) <= _SHOWN_CHARS else f"{text[:half]} … {text[-half:]}"


class UsedMemory:
    """The latest N requests by id. Older ones are forgotten. Used in one event loop."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_id: OrderedDict[str, Used | UsedByPrompts] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, used: Used | UsedByPrompts) -> None:
        self._by_id.pop(used.request_id, None)
        self._by_id[used.request_id] = used
        while len(self._by_id) > self._capacity:
            self._by_id.popitem(last=False)

    def get(self, request_id: str) -> Used | UsedByPrompts | None:
        """A request by the id in its ``regrad`` object, or by the id of vLLM's answer. None if it is unknown."""
        for prefix in ("", *ID_PREFIXES):
            if request_id.startswith(prefix):
                found = self._by_id.get(request_id[len(prefix) :])
                if found is not None:
                    return found
        return None
