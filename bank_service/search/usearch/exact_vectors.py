"""Float32 vectors of small namespaces in memory, for exact searches.

They follow the catalog on each query's view. A search first applies the changes since the search before.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

import numpy as np

from bank_service.catalog.contract import CatalogView
from bank_service.values.vectors import KeyArray, unit
from bank_service.wire.record import FloatArray

TIE = 1e-5  # vectors with a smaller difference of cosines count as equally near
MAX_VECTORS = 100_000  # of all namespaces together, including spare rows: 150 MB at 384 dimensions


class ExactVectors:
    """Compares a query with every vector of a namespace. Drops the least recently used namespaces from memory."""

    def __init__(self, dimension: int, max_vectors: int = MAX_VECTORS) -> None:
        self._dimension = dimension
        self._max_vectors = max_vectors
        self._lock = threading.Lock()  # protects the table below
        self._spaces: OrderedDict[str, _Space] = OrderedDict()
        self._num_places = 0  # the sum of ``counted`` over all spaces

    def search(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        count: int,
        keep: Callable[[], Collection[int]] | None = None,
    ) -> list[int]:
        """The keys of the ``count`` nearest documents in the view, and of all that are as near as the last of them.

        ``vector``: float32 (dimension,). Only keys in ``keep()`` may be found. ``view`` must be fresh: nothing was read
        from it. Otherwise its state may be older than the vectors.
        """
        with self._lock:
            space = self._spaces.setdefault(namespace, _Space(self._dimension))
            self._spaces.move_to_end(namespace)
        with space.lock:
            space.follow(view, namespace)
            found = space.search(unit(vector), count, None if keep is None else keep())
        with self._lock:
            self._count(namespace, space)
            while len(self._spaces) > 1 and self._num_places > self._max_vectors:
                self._num_places -= self._spaces.popitem(last=False)[1].counted
        return found

    def _count(self, namespace: str, space: _Space) -> None:
        """Adds the space's growth to the sum, unless the space was dropped meanwhile. Call it with the lock."""
        if self._spaces.get(namespace) is space:
            self._num_places += space.room - space.counted
            space.counted = space.room


class _Space:
    """One namespace: ``size`` vectors in the first rows of a matrix that grows by doubling."""

    def __init__(self, dimension: int) -> None:
        self.lock = threading.Lock()
        self.size = 0
        self.counted = 0  # the space's part of the table's sum
        self._sequence = 0  # the last change that it reflects
        self._rows: dict[int, int] = {}  # key → row
        self._keys: KeyArray = np.empty(16, np.int64)
        self._vectors: FloatArray = np.empty((16, dimension), np.float32)

    @property
    def room(self) -> int:
        """The number of vectors that fit the allocated memory."""
        return len(self._keys)

    def follow(self, view: CatalogView, namespace: str) -> None:
        for change in view.changes_of(namespace, self._sequence, alive=not self._sequence):
            if change.embedding is None:
                self._remove(change.key)
            else:
                self._put(change.key, np.frombuffer(change.embedding, "<f4"))
        self._sequence = view.sequence()

    def search(self, vector: FloatArray, count: int, keep: Collection[int] | None) -> list[int]:
        if keep is None:
            rows = np.arange(self.size)
        else:
            rows = np.fromiter((self._rows[key] for key in keep if key in self._rows), np.int64)
        scores = self._vectors[rows] @ vector
        if count < len(scores):
            # The last bits of ``@`` depend on a row's position. So equal vectors have equal scores only within TIE.
            near = scores >= np.partition(scores, -count)[-count] - TIE
            rows, scores = rows[near], scores[near]
        best = np.lexsort((self._keys[rows], -scores))
        return [int(key) for key in self._keys[rows[best]]]

    def _put(self, key: int, vector: FloatArray) -> None:
        row = self._rows.setdefault(key, self.size)
        if row == self.size:
            self.size += 1
            if self.size > len(self._keys):
                self._keys = np.concatenate([self._keys, np.empty_like(self._keys)])
                self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
            self._keys[row] = key
        self._vectors[row] = vector

    def _remove(self, key: int) -> None:
        """Removes a vector. The last row moves into its place."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        self.size -= 1
        if row != self.size:
            last = int(self._keys[self.size])
            self._keys[row], self._vectors[row] = last, self._vectors[self.size]
            self._rows[last] = row
