"""The documents of each step: from the requests in vLLM's batch to the table that the kernels read.

A request's documents get a hold when a step first sees the request. They keep it until the model runner forgets the
request. So the API server may let go as soon as the answer ends, while a last step of the request still runs. A request
that was preempted either stays known to the runner, or it comes back as a new one while the API server holds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bank_service.wire.record import GradientFormatError
from regrad_vllm.serve.arena.record_files import ArenaError
from regrad_vllm.serve.kernels.batch import BatchDocuments
from regrad_vllm.serve.recipe import PATH_PREFIX, RecipeError
from regrad_vllm.serve.seams.worker_patches import AdapterRequest, StepRequests
from regrad_vllm.serve.worker.admissions import Admissions
from regrad_vllm.serve.worker.device import Device, Resident
from regrad_vllm.serve.worker.pool import Pool, PoolFull

_LOGGER = logging.getLogger("regrad")


@dataclass(frozen=True, slots=True)
class _Documents:
    """The documents of one request, which has a hold on them."""

    name: str  # of its adapter
    digests: tuple[str, ...]
    addresses: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    forms: NDArray[np.int32]


class Steps:
    """The documents of the running requests. ``set`` and ``clear`` run on the thread of the engine's steps."""

    def __init__(self, admissions: Admissions, pool: Pool, device: Device) -> None:
        self._admissions = admissions
        self._pool = pool
        self._device = device
        self._held: dict[str, _Documents] = {}  # by request id
        self._known: Container[str] = ()
        self._lock = threading.Lock()  # guards the fields above and below
        # The batch of the table that the device has: (ids, adapters). None: it has another table, or none.
        self._batch: tuple[list[str], list[AdapterRequest | None]] | None = None
        self._num_tokens: NDArray[np.integer[Any]] = np.empty(0, np.int64)
        self._num_steps = 0
        self._step_ms = 0.0
        self.num_late = 0  # requests whose documents were loaded inside a step
        self.num_lost = 0  # requests that ran without their documents
        pool.on_full = self.forget

    def set(self, requests: StepRequests) -> None:
        """A step with these requests begins. It never raises an error of a document."""
        start = time.perf_counter()
        with self._lock:
            self._known = requests.known
            self._forget()
            batch = list(requests.ids), [requests.adapter(id) for id in requests.ids]
            if batch != self._batch or not np.array_equal(requests.num_tokens, self._num_tokens):
                self._device.set_batch(self._table(*batch, np.array(requests.num_tokens, np.int64)))
                self._batch, self._num_tokens = batch, np.array(requests.num_tokens)
        self._num_steps += 1
        self._step_ms += (time.perf_counter() - start) * 1000

    def clear(self) -> None:
        """A step without requests begins, such as a dummy run."""
        with self._lock:
            self._batch = None
            self._device.set_batch(None)

    def forget(self) -> None:
        """Lets go of the documents of requests that the runner has forgotten. Called on any thread."""
        with self._lock:
            self._forget()

    def figures(self) -> dict[str, float]:
        """Counts and sums since the start, and the present holds. The status endpoint shows them by these names."""
        self.forget()
        return {
            "num_running": len(self._held),
            "num_steps": self._num_steps,
            "step_ms": round(self._step_ms, 3),  # that all steps took here
            "num_late": self.num_late,
            "num_lost": self.num_lost,
        }

    def _forget(self) -> None:
        for id in [id for id in self._held if id not in self._known]:
            self._pool.let_go(self._held.pop(id).digests)
            self._batch = None  # the id may come back with other documents

    def _table(
        self, ids: list[str], adapters: list[AdapterRequest | None], num_tokens: NDArray[np.int64]
    ) -> BatchDocuments | None:
        """The table of a step. None if no request is ours."""
        found = [self._documents(id, adapter) for id, adapter in zip(ids, adapters, strict=True)]
        ours = [documents for documents in found if documents is not None]
        if not ours:
            return None
        is_ours = np.array([documents is not None for documents in found])
        rows = np.flatnonzero(np.repeat(is_ours, num_tokens))
        counts = np.array([len(documents.addresses) for documents in ours], np.int64)
        starts = np.cumsum(counts) - counts  # of each request among the documents of all
        of_row = np.repeat(np.arange(len(ours)), num_tokens[is_ours])
        first = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts[of_row], out=first[1:])
        place = np.repeat(starts[of_row] - first[:-1], counts[of_row]) + np.arange(first[-1])
        return BatchDocuments(
            int(num_tokens.sum()), rows, first,
            np.concatenate([documents.addresses for documents in ours])[place],
            np.concatenate([documents.coefficients for documents in ours])[place],
            np.concatenate([documents.forms for documents in ours])[place],
        )  # fmt: skip

    def _documents(self, id: str, adapter: AdapterRequest | None) -> _Documents | None:
        """A request's documents, held. None if it has no adapter of ours."""
        if adapter is None or not adapter.lora_path.startswith(PATH_PREFIX):
            return None
        held = self._held.get(id)
        if held is None or held.name != adapter.lora_name:
            if held is not None:
                self._pool.let_go(held.digests)
            held = self._held[id] = self._hold(adapter)
        return held

    def _hold(self, adapter: AdapterRequest) -> _Documents:
        """A request's documents. Without one of them the request is lost: it runs on φ* alone.

        An error here would end the engine, and vLLM can't end one request from inside a step. The server holds a
        request's documents until the engine is done with it. So a request is lost only if the server's connection to
        the door broke, and the document can't be loaded again. That is logged and counted.
        """
        try:
            recipe = self._admissions.recipe(adapter.lora_name, adapter.lora_path)
            is_late = not self._admissions.is_resident(recipe)
            residents = self._pool.hold(self._admissions.arenas, recipe.digests, in_step=True)
        except (RecipeError, PoolFull, ArenaError, GradientFormatError):
            _LOGGER.exception("adapter %s runs without its documents", adapter.lora_name)
            self.num_lost += 1
            return _documents(adapter.lora_name, (), (), [])
        self.num_late += is_late
        return _documents(adapter.lora_name, recipe.digests, recipe.coefficients, residents)


def _documents(
    name: str, digests: tuple[str, ...], coefficients: Sequence[float], residents: list[Resident]
) -> _Documents:
    return _Documents(
        name,
        digests,
        np.array([resident.address for resident in residents], np.int64),
        np.array(coefficients, np.float32),
        np.array([resident.form for resident in residents], np.int32),
    )
