"""What the bank needs of a vector index, and the exact one.

An index is derived from the catalog: keys are the catalog's row keys, and each namespace is searched alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bank_service.values.vectors import KeyArray, unit
from bank_service.wire.codec import FloatArray


class VectorIndex(Protocol):
    """Nearest vectors by cosine, per namespace. Safe to call from many threads."""

    def put(self, namespace: str, keys: Sequence[int], vectors: FloatArray) -> None:
        """Adds or replaces ``vectors`` (len(keys), dimension), finite and not zero. A key stands once in ``keys``."""

    def remove(self, namespace: str, keys: Sequence[int]) -> None:
        """Forgets keys; those that aren't there are no error."""

    def search(self, namespace: str, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        """The nearest min(count, size) keys, best first, and their cosines. Exactly that many."""

    def size(self, namespace: str) -> int:
        """Number of keys in the namespace; 0 for an unknown one."""


class ExactIndex:
    """Compares with every vector: the oracle of the tests, and enough for small collections."""

    def __init__(self) -> None:
        self._spaces: dict[str, dict[int, FloatArray]] = {}

    def put(self, namespace: str, keys: Sequence[int], vectors: FloatArray) -> None:
        self._spaces.setdefault(namespace, {}).update(zip(keys, unit(vectors), strict=True))

    def remove(self, namespace: str, keys: Sequence[int]) -> None:
        space = self._spaces.get(namespace, {})
        for key in keys:
            space.pop(key, None)

    def search(self, namespace: str, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        space = self._spaces.get(namespace, {}).copy()
        if not space:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        keys = np.fromiter(space, dtype=np.int64)
        scores = np.stack(list(space.values())) @ unit(vector)
        best = np.lexsort((keys, -scores))[:count]
        return keys[best], scores[best]

    def size(self, namespace: str) -> int:
        return len(self._spaces.get(namespace, {}))
