"""Orders documents by the catalog's float32 vectors, whichever store proposed them."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from bank_service.catalog.contract import MAX_KEYS, CatalogView
from bank_service.catalog.entries import Candidate
from bank_service.values.documents import Query
from bank_service.values.vectors import unit
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span


def depth_of(query: Query) -> int:
    """The number of documents to look for, which is larger than ``top_k``.

    A vector store may order neighbours wrongly or miss some, and hybrid retrieval merges two lists.
    """
    return 2 * query.top_k + 16


def candidates_of(view: CatalogView, keys: Sequence[int]) -> dict[int, Candidate]:
    """key → candidate, without deleted documents."""
    found: dict[int, Candidate] = {}
    for start in range(0, len(keys), MAX_KEYS):
        found.update((item.key, item) for item in view.candidates(keys[start : start + MAX_KEYS]))
    return found


def closest(view: CatalogView, keys: Sequence[int], vector: FloatArray, count: int) -> dict[int, Candidate]:
    """key → candidate for the ``count`` nearest documents. Ids decide between equally near ones. At most MAX_KEYS
    vectors are in memory at once."""
    if len(keys) <= count:
        return candidates_of(view, keys)
    best: list[tuple[float, str, Candidate]] = []
    with span("catalog.scan", num_documents=len(keys)):
        for start in range(0, len(keys), MAX_KEYS):
            found = candidates_of(view, keys[start : start + MAX_KEYS])
            cosines = cosines_of(found, vector)
            best = heapq.nsmallest(count, [*best, *((-cosines[key], item.id, item) for key, item in found.items())])
    return {item.key: item for *_, item in best}


def cosines_of(candidates: Mapping[int, Candidate], vector: FloatArray) -> dict[int, float]:
    """The mapping's key → the candidate's cosine with ``vector``, in -1..1."""
    if not candidates:
        return {}
    joined = b"".join([candidate.embedding for candidate in candidates.values()])
    vectors = np.frombuffer(joined, dtype="<f4").reshape(len(candidates), -1)
    # The last bits of ``@`` depend on the row's position. A score must not depend on other documents, so use einsum.
    cosines = np.clip(np.einsum("ij,j->i", vectors, unit(vector)), -1.0, 1.0)
    return dict(zip(candidates, cosines.tolist(), strict=True))
