"""The graph of one namespace: usearch's HNSW with float16 vectors, made safe for many threads.

An approximate search can return too few vectors. In a small graph, or one with many removed vectors, it can also miss a
near neighbour. So a small graph is searched exhaustively. A search that returned too few vectors is repeated
exhaustively.

usearch keeps the node of a removed vector until a new vector takes its place. ``num_dead`` counts these nodes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

import bank_service.runtime.onnx_runtime  # noqa: F401 - before usearch

from usearch.index import Index  # isort: skip

from bank_service.runtime.locks import FairLock
from bank_service.values.vectors import KeyArray
from bank_service.wire.record import FloatArray

LARGE_SIZE, HUGE_SIZE = 50_000, 300_000  # vectors; searches of graphs above these sizes keep more candidates
EXHAUSTIVE_SIZE = 5_000  # vectors; up to this size, a comparison with each is as fast as the graph
VECTORS_PER_HOLD = 16  # vectors that a ``put`` adds before waiting searches run; about 1 ms each among a million
_VERSIONS = itertools.count()  # of graphs; no two graphs have the same version


class Graph:
    """Nearest vectors by cosine. One thread at a time is inside usearch.

    usearch allows no search during a removal. Two searches at once may get the same thread number from it, and then
    break each other.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._size = len(index)
        self._nodes = int(index.stats.nodes)  # counted here from now on, because usearch would walk through all nodes
        self.version = next(_VERSIONS)  # a new one after each change
        self._lock = FairLock()  # waiting searches run between the parts of a long ``put``

    def put(self, keys: KeyArray | np.ndarray, vectors: FloatArray) -> None:
        for start in range(0, len(keys), VECTORS_PER_HOLD):
            part = slice(start, start + VECTORS_PER_HOLD)
            with self._lock:
                self.version = next(_VERSIONS)
                self._remove(keys[part])
                self._index.add(keys[part], vectors[part], threads=1)
                self._size = len(self._index)
                self._nodes = max(self._nodes, self._size)  # new vectors fill the places of removed ones first

    def remove(self, keys: np.ndarray) -> None:
        with self._lock:
            self._remove(keys)
            self._size = len(self._index)

    def search(self, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        with self._lock:
            size = self._size
            wanted = min(count, size)
            if not wanted:
                return np.empty(0, np.int64), np.empty(0, np.float32)
            self._index.expansion_search = expansion_of(size)  # type: ignore[misc]  # its annotations hide the setter
            found = self._index.search(vector, wanted, threads=1, exact=size <= EXHAUSTIVE_SIZE)
            if len(found) < wanted:
                found = self._index.search(vector, wanted, threads=1, exact=True)
            return found.keys.astype(np.int64), (1.0 - found.distances).astype(np.float32)

    def size(self) -> int:
        """The number of vectors. It does not wait for the lock, so it may count part of a ``put`` under way."""
        return self._size

    def num_nodes(self) -> int:
        """The number of nodes, including those of removed vectors."""
        return self._nodes

    def num_dead(self) -> int:
        """The number of nodes of removed vectors. It does not wait for the lock."""
        return max(0, self._nodes - self._size)

    def save(self, path: Path) -> int:
        """Writes the graph to a file and returns the written version. OSError."""
        with self._lock:
            try:
                self._index.save(str(path))
            except RuntimeError as error:  # usearch raises it for a full disk
                raise OSError(f"{path} could not be written: {error}") from error
            # usearch does not report a failure to write the last buffer.
            if path.stat().st_size != self._index.serialized_length:
                raise OSError(f"{path} could not be written: its end is missing")
            return self.version

    def _remove(self, keys: np.ndarray) -> None:
        present = keys[np.atleast_1d(self._index.contains(keys))]
        if len(present):
            self.version = next(_VERSIONS)
            self._index.remove(present)


def expansion_of(size: int) -> int:
    """The number of candidates that a search keeps in a graph of ``size`` vectors.

    Among a million vectors, 128 candidates found 95.5% of the ten nearest, 256 found 97.5%, and 384 found 99.3%. See
    docs/benchmarks.md.
    """
    return 128 if size <= LARGE_SIZE else 256 if size <= HUGE_SIZE else 384


def new_index(dimension: int) -> Index:
    return Index(ndim=dimension, metric="cos", dtype="f16", connectivity=16)
