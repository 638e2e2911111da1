"""The graph of one namespace: usearch's HNSW with float16 vectors, made safe for many threads.

An approximate search can return too few vectors. In a small graph, or one with many removed vectors, it can also miss a
near neighbour. So a small graph is searched exhaustively. A search that returned too few vectors is repeated
exhaustively.

usearch keeps the node of a removed vector until a new vector takes its place. ``num_dead`` counts these nodes.

Of many near-equal vectors, most are in ``crowds`` and not in usearch's graph.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

import bank_service.runtime.onnx_runtime  # noqa: F401 - before usearch

from usearch.index import Index  # isort: skip

from bank_service.runtime.locks import FairLock
from bank_service.search.usearch.crowds import CROWDED, NEAR, Crowds
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

    def __init__(self, index: Index, crowds: Crowds | None = None, *, is_old: bool = False) -> None:
        self._index = index
        self._crowds = crowds or Crowds()
        self.is_old = is_old  # of a version without crowds: near-equal vectors may have broken it, and it gets none
        self._nodes = int(index.stats.nodes)  # counted here from now on, because usearch would walk through all nodes
        self._count()
        self.version = next(_VERSIONS)  # a new one after each change
        self._lock = FairLock()  # waiting searches run between the parts of a long ``put``

    @classmethod
    def load(cls, path: Path, dimension: int) -> Graph:
        """Reads a graph that ``save`` wrote, also by an older version. OSError, RuntimeError or ValueError where it
        can't be read."""
        index = new_index(dimension)
        index.load(str(path))
        with path.open("rb") as file:
            if file.seek(index.serialized_length) == path.stat().st_size:
                return cls(index, is_old=True)
            return cls(index, Crowds.load(file, dimension))

    def put(self, keys: KeyArray | np.ndarray, vectors: FloatArray) -> None:
        """``vectors`` have length 1. Keys must be distinct."""
        for start in range(0, len(keys), VECTORS_PER_HOLD):
            part = slice(start, start + VECTORS_PER_HOLD)
            with self._lock:
                self.version = next(_VERSIONS)
                self._remove(keys[part])
                self._index.expansion_search = 2 * CROWDED  # type: ignore[misc]  # its annotations hide the setter
                rest = [row for row in range(*part.indices(len(keys))) if not self._joins(int(keys[row]), vectors[row])]
                if rest:
                    self._index.add(keys[rest], vectors[rest], threads=1)
                self._count()

    def remove(self, keys: np.ndarray) -> None:
        with self._lock:
            self._remove(keys)
            self._count()

    def search(self, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        """The nearest keys and their cosines, best first: at least min(count, size). ``vector`` has length 1."""
        with self._lock:
            num_nodes = len(self._index)
            # A crowd's vectors can be nearer than its leader, so it takes more leaders than hits.
            wanted = min(max(count, 2 * CROWDED) if self._crowds else count, num_nodes)
            if not wanted:
                return np.empty(0, np.int64), np.empty(0, np.float32)
            self._index.expansion_search = expansion_of(num_nodes)  # type: ignore[misc]  # its annotations hide the setter
            found = self._index.search(vector, wanted, threads=1, exact=num_nodes <= EXHAUSTIVE_SIZE)
            if len(found) < wanted:
                found = self._index.search(vector, wanted, threads=1, exact=True)
            keys, cosines = found.keys.astype(np.int64), (1.0 - found.distances).astype(np.float32)
            if not self._crowds:
                return keys, cosines
            more_keys, more_cosines = self._crowds.near(keys.tolist(), vector, count)
        # Cosines of the graph have float16's errors, so it leaves no key out.
        keys, cosines = np.concatenate([keys, more_keys]), np.concatenate([cosines, more_cosines])
        best = np.lexsort((keys, -cosines))
        return keys[best], cosines[best]

    def size(self) -> int:
        """The number of vectors. It does not wait for the lock, so it may count part of a ``put`` under way."""
        return self._size

    def num_nodes(self) -> int:
        """The number of nodes, including those of removed vectors."""
        return self._nodes

    def num_dead(self) -> int:
        """The number of nodes of removed vectors. It does not wait for the lock."""
        return max(0, self._nodes - self._num_alive)

    def save(self, path: Path) -> int:
        """Writes the graph to a file and returns the written version. OSError."""
        with self._lock:
            try:
                self._index.save(str(path))
                # usearch does not report a failure to write the last buffer.
                if path.stat().st_size != self._index.serialized_length:
                    raise OSError("its end is missing")
                if not self.is_old:
                    with path.open("ab") as file:
                        self._crowds.save(file)
            except (OSError, RuntimeError) as error:  # usearch raises RuntimeError for a full disk
                raise OSError(f"{path} could not be written: {error}") from error
            return self.version

    def _remove(self, keys: np.ndarray) -> None:
        for key in keys.tolist():
            if key in self._crowds:
                self.version = next(_VERSIONS)
                self._crowds.leave(key)
        present = keys[np.atleast_1d(self._index.contains(keys))]
        if len(present):
            self.version = next(_VERSIONS)
            self._index.remove(present)
        for key in present.tolist():
            heir = self._crowds.succeed(key)
            if heir is not None:
                self._index.add(*heir, threads=1)

    def _joins(self, key: int, vector: FloatArray) -> bool:
        """Adds a vector to a crowd, if the graph has enough near-equal ones."""
        if self.is_old or self._num_alive < CROWDED:
            return False
        found = self._index.search(vector, CROWDED, threads=1)
        is_crowded = len(found) == CROWDED and found.distances[-1] <= NEAR
        return is_crowded and self._crowds.join(int(found.keys[0]), key, vector)

    def _count(self) -> None:
        self._num_alive = len(self._index)
        self._size = self._num_alive + len(self._crowds)
        self._nodes = max(self._nodes, self._num_alive)  # new vectors fill the places of removed ones first


def expansion_of(size: int) -> int:
    """The number of candidates that a search keeps in a graph of ``size`` vectors.

    Among a million vectors, 128 candidates found 95.5% of the ten nearest, 256 found 97.5%, and 384 found 99.3%. See
    docs/benchmarks.md.
    """
    return 128 if size <= LARGE_SIZE else 256 if size <= HUGE_SIZE else 384


def new_index(dimension: int) -> Index:
    return Index(ndim=dimension, metric="cos", dtype="f16", connectivity=16)
