"""A worker's cache of stored gradients, ready for composing. All adapters with a document share its entry.

A request holds the entries that it needs. When the cache is full, the least recently used entry without a hold is
evicted first. An entry is checked when it is loaded and never changes. So composing from a held entry can't fail.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from bank_service.wire.codecs.dense import INT8_BLOCK
from bank_service.wire.codecs.int4 import INT4_BLOCK, int4_codes
from bank_service.wire.codecs.lowrank import LowRankCodec, unpacked
from bank_service.wire.record import HEADER_BYTES, GradientSpec, codec_named, decode_gradient, verify_record
from regrad_vllm.adapt.arena import read_record
from regrad_vllm.adapt.stored_gradient import BF16, FACTORS, FLOAT32, INT8, Payload, StoredGradient

EntryT = TypeVar("EntryT")

assert INT4_BLOCK == INT8_BLOCK, "codes of both are composed from by one loop"


class DocumentCacheFull(RuntimeError):
    """There is no room, because all entries are in use."""


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """The cache's content and counts since its start. The status endpoint shows them by these names."""

    max_bytes: int
    used_bytes: int
    num_entries: int
    num_pinned: int  # entries that are held
    num_hits: int
    num_misses: int
    num_evictions: int


@dataclass(slots=True)
class _Kept(Generic[EntryT]):
    entry: EntryT
    num_bytes: int
    num_holds: int = 0


class DocumentCache(Generic[EntryT]):
    """A cache of entries by digest. Thread-safe."""

    def __init__(self, load: Callable[[str, str], tuple[EntryT, int]], max_bytes: int) -> None:
        """load: (arena folder, digest) → (entry, its size in bytes). ``hold`` passes its errors on."""
        self._load = load
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept[EntryT]] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._num_hits = 0
        self._num_misses = 0
        self._num_evictions = 0

    def hold(self, arena: str, digests: Sequence[str]) -> None:
        """Loads the missing entries and holds all. A digest that is named twice is held twice. All or nothing.

        DocumentCacheFull, or an error of ``load``.
        """
        held: list[str] = []
        try:
            for digest in digests:
                if not self._hold_present(digest):
                    entry, num_bytes = self._load(
                        arena, digest
                    )  # outside the lock, because it reads and hashes megabytes
                    self._add_held(digest, entry, num_bytes)
                held.append(digest)
        except BaseException:
            self.let_go(held)
            raise

    def let_go(self, digests: Iterable[str]) -> None:
        """Releases one hold of each digest."""
        with self._lock:
            for digest in digests:
                self._kept[digest].num_holds -= 1
            self._shrink(0)

    def get(self, digests: Sequence[str]) -> list[EntryT]:
        """The entries of held digests, in order."""
        with self._lock:
            return [self._kept[digest].entry for digest in digests]

    def figures(self) -> CacheFigures:
        with self._lock:
            return CacheFigures(
                max_bytes=self._max_bytes,
                used_bytes=self._used_bytes,
                num_entries=len(self._kept),
                num_pinned=sum(kept.num_holds > 0 for kept in self._kept.values()),
                num_hits=self._num_hits,
                num_misses=self._num_misses,
                num_evictions=self._num_evictions,
            )

    def _hold_present(self, digest: str) -> bool:
        with self._lock:
            kept = self._kept.get(digest)
            if kept is None:
                self._num_misses += 1
                return False
            self._num_hits += 1
            kept.num_holds += 1
            self._kept.move_to_end(digest)
            return True

    def _add_held(self, digest: str, entry: EntryT, num_bytes: int) -> None:
        with self._lock:
            kept = self._kept.get(digest)
            if kept is None:  # another thread may have loaded it
                if not self._shrink(num_bytes):
                    raise DocumentCacheFull(
                        f"a worker must have {num_bytes} bytes free for a gradient, all of its {self._max_bytes} are "
                        "used by running requests; retry later or raise --regrad-worker-bytes"
                    )
                kept = self._kept[digest] = _Kept(entry, num_bytes)
                self._used_bytes += num_bytes
            kept.num_holds += 1

    def _shrink(self, num_bytes: int) -> bool:
        """Evicts entries until ``num_bytes`` more fit. Returns whether they fit."""
        for digest in list(self._kept):
            if self._used_bytes + num_bytes <= self._max_bytes:
                return True
            if not self._kept[digest].num_holds:
                self._used_bytes -= self._kept.pop(digest).num_bytes
                self._num_evictions += 1
        return self._used_bytes + num_bytes <= self._max_bytes


def load_gradient(arena: str, digest: str, spec: GradientSpec) -> tuple[StoredGradient, int]:
    """A checked record of the arena, and its size in the cache in bytes. ArenaError, GradientFormatError."""
    payload = read_payload(arena, digest, spec)
    return StoredGradient(payload.kind, payload.arrays), payload.num_bytes


def read_payload(arena: str, digest: str, spec: GradientSpec) -> Payload:
    """The checked values of a record in the arena. ArenaError, GradientFormatError.

    The file is copied, not mapped, because a truncated file would kill a worker that reads from a mapping. Codes of
    four bits get a byte each. A codec that the loops can't read is decoded to float32.
    """
    # The digest was checked when the record was published, and the record's own check covers all bytes.
    record = read_record(arena, digest, verify=False)
    header = verify_record(record, spec)
    payload = memoryview(record)[HEADER_BYTES:]
    if header.codec == "int8":
        num_blocks = -(-spec.num_values // INT8_BLOCK)
        scales = np.frombuffer(payload, np.float32, num_blocks)
        return Payload(INT8, np.frombuffer(payload, np.int8, offset=4 * num_blocks), scales)
    if header.codec == "int4":
        return Payload(INT8, *int4_codes(payload, spec))
    if header.codec == "bf16":
        return Payload(BF16, np.frombuffer(payload, np.uint16))
    if isinstance(codec_named(header.codec), LowRankCodec):
        factors = unpacked(payload, spec)
        return Payload(FACTORS, factors.codes, factors.scales, factors.shorts, factors.table)
    return Payload(FLOAT32, decode_gradient(record, spec))
