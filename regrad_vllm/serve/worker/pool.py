"""The documents in one worker, by digest. A held document stays. Of the others the least recently used one goes first.

The door holds a request's documents before the request is scheduled, and the steps hold them while the engine runs it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from regrad_vllm.serve.arena.record_files import ArenaError
from regrad_vllm.serve.worker.device import Device, NoMemory, Resident


class PoolFull(RuntimeError):
    """There is no room, because running requests use all documents in the pool."""


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """The pool's content and counts since its start. The status endpoint shows them by these names."""

    max_bytes: int
    used_bytes: int
    num_documents: int
    num_held: int  # documents that are held
    num_hits: int
    num_misses: int
    num_evictions: int


@dataclass(slots=True)
class _Kept:
    resident: Resident
    num_holds: int = 0


class Pool:
    """A worker's documents. Thread-safe."""

    def __init__(self, device: Device, max_bytes: int) -> None:
        self.on_full: Callable[[], object] = lambda: None  # lets go of what nobody needs any more
        self._device = device
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._unheld: OrderedDict[str, None] = OrderedDict()  # the digests without a hold, least recently used first
        self._used_bytes = 0
        self._num_hits = 0
        self._num_misses = 0
        self._num_evictions = 0

    def hold(self, arenas: Iterable[str], digests: Sequence[str], *, in_step: bool = False) -> list[Resident]:
        """Holds documents, and loads the missing ones from the first arena that has them. All or nothing.

        A digest that is named twice is held twice. in_step: the engine waits, so the pool grows beyond its budget
        rather than raise PoolFull. On a device without memory it may raise it. PoolFull, ArenaError,
        GradientFormatError.
        """
        held: list[Resident] = []
        try:
            for digest in digests:
                found = self._hold_present(digest)
                # Outside the lock, because it reads and hashes the whole record.
                held.append(found or self._add_held(digest, self._load(arenas, digest, in_step), in_step=in_step))
        except BaseException:
            self.let_go(digests[: len(held)])
            raise
        return held

    def holds_all(self, digests: Iterable[str]) -> bool:
        """Whether all these documents are in the pool, so that ``hold`` needs no time."""
        with self._lock:
            return all(digest in self._kept for digest in digests)

    def let_go(self, digests: Iterable[str]) -> None:
        """Releases one hold of each digest."""
        with self._lock:
            for digest in digests:
                kept = self._kept[digest]
                kept.num_holds -= 1
                if not kept.num_holds:
                    self._unheld[digest] = None
            self._shrink(0, 0)

    def figures(self) -> PoolFigures:
        with self._lock:
            return PoolFigures(
                max_bytes=self._max_bytes,
                used_bytes=self._used_bytes,
                num_documents=len(self._kept),
                num_held=len(self._kept) - len(self._unheld),
                num_hits=self._num_hits,
                num_misses=self._num_misses,
                num_evictions=self._num_evictions,
            )

    def _hold_present(self, digest: str) -> Resident | None:
        with self._lock:
            kept = self._kept.get(digest)
            if kept is None:
                self._num_misses += 1
                return None
            self._num_hits += 1
            return self._held(digest, kept)

    def _load(self, arenas: Iterable[str], digest: str, in_step: bool) -> Resident:
        """Loads a document. If the device has no memory for it, documents that nobody holds make room first."""
        try:
            return self._load_once(arenas, digest)
        except NoMemory:
            if not in_step:
                self.on_full()
            with self._lock:
                self._shrink(self._max_bytes + 1, 0)
        try:
            return self._load_once(arenas, digest)
        except NoMemory as error:
            raise PoolFull(str(error)) from error

    def _load_once(self, arenas: Iterable[str], digest: str) -> Resident:
        missing = ArenaError(f"an arena must hold gradient {digest}, none is known; restart the server")
        for arena in arenas:
            try:
                return self._device.load(arena, digest)
            except ArenaError as error:
                missing = error
        raise missing

    def _add_held(self, digest: str, resident: Resident, *, in_step: bool) -> Resident:
        for last_try in (False, True):
            with self._lock:
                kept = self._kept.get(digest)
                if kept is not None:  # another thread has loaded it
                    self._device.forget(resident)
                elif self._shrink(resident.num_bytes, 1) or in_step:
                    kept = self._kept[digest] = _Kept(resident)
                    self._used_bytes += resident.num_bytes
                if kept is not None:
                    return self._held(digest, kept)
                refusal = self._refusal(resident.num_bytes)
            if not last_try:
                self.on_full()
        self._device.forget(resident)
        raise PoolFull(refusal)

    def _refusal(self, num_bytes: int) -> str:
        """Why a document of ``num_bytes`` doesn't fit. Under the lock."""
        if self._used_bytes + num_bytes <= self._max_bytes:
            return (
                f"a worker on this machine must keep {self._device.max_documents} documents at most, running requests "
                "use them all; retry later or raise vm.max_map_count"
            )
        return (
            f"a worker must have {num_bytes} bytes free for a document, running requests use all of its "
            f"{self._max_bytes}; retry later or raise --regrad-worker-bytes"
        )

    def _held(self, digest: str, kept: _Kept) -> Resident:
        """Adds a hold. Under the lock."""
        kept.num_holds += 1
        self._unheld.pop(digest, None)
        return kept.resident

    def _shrink(self, num_bytes: int, num_documents: int) -> bool:
        """Drops documents that nobody holds until so many more fit. Returns whether they fit. Under the lock."""

        def fits() -> bool:
            fits_bytes = self._used_bytes + num_bytes <= self._max_bytes
            return fits_bytes and len(self._kept) + num_documents <= self._device.max_documents

        while not fits() and self._unheld:
            resident = self._kept.pop(self._unheld.popitem(last=False)[0]).resident
            self._used_bytes -= resident.num_bytes
            self._num_evictions += 1
            self._device.forget(resident)
        return fits()
