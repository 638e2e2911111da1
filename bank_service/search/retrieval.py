"""Which documents a query is about, on one view of the catalog: the candidates, then their order.

Dense candidates come from where nothing is missed that can be afforded: small namespaces and filters that leave
few are compared vector by vector; else the index proposes more than are asked for, and where a filter leaves too
few of them, more again.

Equally near documents come in order of their ids, also where not all of them are among the hits. Only the index
proposes some of them by chance, where there are more than it is asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bank_service.catalog.contract import MAX_KEYS, CatalogView
from bank_service.catalog.entries import Candidate, Score
from bank_service.search.exact_vectors import ExactVectors
from bank_service.search.vector_index import VectorIndex
from bank_service.values.documents import Query, Retrieval
from bank_service.values.vectors import unit
from bank_service.wire.codec import FloatArray
from bank_service.wire.tracing import span

SCAN_SIZE = 5_000  # documents that a filter leaves; reading their vectors takes tens of milliseconds
MAX_PROPOSALS = 20_000  # of the index, for one filtered query; beyond, all that match are compared
GROWTH = 4  # of the number of proposals, from one search of the index to the next
RANK_CONSTANT = 60  # of reciprocal rank fusion, as Cormack et al. (2009) set it


@dataclass(frozen=True, slots=True)
class Found:
    """The documents that answer a query, as they stand in a view."""

    scores: dict[int, Score]  # by key, best first
    candidates: dict[int, Candidate]  # by key, those of ``scores`` among them
    sequence: int  # of the state that was searched
    is_stale: bool  # a document proposed had changed since the index was read


class Retriever:
    """Finds and orders documents."""

    def __init__(self, index: VectorIndex, exact: ExactVectors, exact_below: int) -> None:
        self._index = index
        self._exact = exact
        self._exact_below = exact_below

    def find(self, view: CatalogView, query: Query, vector: FloatArray, indexed: int) -> Found:
        """The best ``top_k``, those below ``min_score`` left out. ``view`` must not have been read from before.

        ``indexed``: the sequence that the index reflects at least.
        """
        depth = depth_of(query)
        keys, sequence = self._dense(view, query, vector, indexed, depth)
        words: dict[int, float] = {}
        if query.retrieval is not Retrieval.DENSE:
            with span("catalog.words"):
                words = view.best_words(query.namespace, query.text, query.conditions, depth)
        candidates = candidates_of(view, [*keys, *(words.keys() - set(keys))])
        dense = [candidates[key] for key in keys if key in candidates]
        is_stale = len(dense) < len(keys) or any(candidate.sequence > sequence for candidate in dense)
        cosines = cosines_of(candidates, vector)
        nearest = sorted((candidate.key for candidate in dense), key=lambda key: (-cosines[key], candidates[key].id))
        if query.retrieval is Retrieval.DENSE:
            values = {key: cosines[key] for key in nearest}
        elif query.retrieval is Retrieval.LEXICAL:
            values = words
        else:
            values = _fused([nearest[:depth], list(words)])
        best = sorted(values, key=lambda key: (-values[key], candidates[key].id))[: query.top_k]
        scores = {key: Score(values[key], cosines[key]) for key in best if cosines[key] >= query.min_score}
        return Found(scores, candidates, sequence, is_stale)

    def _dense(
        self, view: CatalogView, query: Query, vector: FloatArray, indexed: int, depth: int
    ) -> tuple[list[int], int]:
        """Keys among which the ``depth`` nearest are, and the sequence of the state that was searched."""
        if query.retrieval is Retrieval.LEXICAL:
            return [], view.sequence()
        if self._index.size(query.namespace) <= self._exact_below:
            with span("exact.search"):
                keep = (lambda: self._matching(view, query)) if query.conditions else None
                near = self._exact.search(view, query.namespace, vector, depth, keep)
                return (near if len(near) <= depth else _nearest(view, near, vector, depth)), view.sequence()
        if not query.conditions:
            with span("index.search"):
                keys, _ = self._index.search(query.namespace, vector, depth)
            return keys.tolist(), indexed
        matching = self._matching(view, query, SCAN_SIZE + 1)
        if len(matching) > SCAN_SIZE:
            proposed = self._proposed(view, query, vector, depth)
            if proposed is not None:
                return proposed, indexed
            matching = self._matching(view, query)
        with span("catalog.scan", num_documents=len(matching)):
            return _nearest(view, matching, vector, depth), view.sequence()

    def _matching(self, view: CatalogView, query: Query, limit: int | None = None) -> list[int]:
        with span("catalog.filter"):
            return view.matching(query.namespace, query.conditions, limit)

    def _proposed(self, view: CatalogView, query: Query, vector: FloatArray, depth: int) -> list[int] | None:
        """At least ``depth`` near documents that match, by the index; None where it would take too many proposals."""
        count = depth * GROWTH
        checked: set[int] = set()
        matching: set[int] = set()
        while count <= MAX_PROPOSALS:
            with span("index.search", count=count):
                keys = self._index.search(query.namespace, vector, count)[0].tolist()
            matching |= view.among([key for key in keys if key not in checked], query.conditions)
            checked.update(keys)
            found = [key for key in keys if key in matching]
            if len(found) >= depth:
                return found
            count *= GROWTH
        return None


def depth_of(query: Query) -> int:
    """More than asked for: float16 may misplace neighbours, the graph may miss some, lists are to be fused."""
    return 2 * query.top_k + 16


def candidates_of(view: CatalogView, keys: Sequence[int]) -> dict[int, Candidate]:
    """By key, those that are not deleted."""
    found: dict[int, Candidate] = {}
    for start in range(0, len(keys), MAX_KEYS):
        found.update((item.key, item) for item in view.candidates(keys[start : start + MAX_KEYS]))
    return found


def cosines_of(candidates: dict[int, Candidate], vector: FloatArray) -> dict[int, float]:
    if not candidates:
        return {}
    joined = b"".join([candidate.embedding for candidate in candidates.values()])
    vectors = np.frombuffer(joined, dtype="<f4").reshape(len(candidates), -1)
    # Not by ``@``, whose last bits depend on where a row stands: a score must be the same whatever else is compared.
    cosines = np.clip(np.einsum("ij,j->i", vectors, unit(vector)), -1.0, 1.0)
    return dict(zip(candidates, cosines.tolist(), strict=True))


def _nearest(view: CatalogView, keys: Sequence[int], vector: FloatArray, count: int) -> list[int]:
    """The ``count`` nearest of ``keys``, with no more than MAX_KEYS vectors in memory."""
    best: list[tuple[float, str, int]] = []
    for start in range(0, len(keys), MAX_KEYS):
        found = candidates_of(view, keys[start : start + MAX_KEYS])
        cosines = cosines_of(found, vector)
        best = heapq.nsmallest(count, [*best, *((-cosines[key], found[key].id, key) for key in cosines)])
    return [key for *_, key in best]


def _fused(lists: Sequence[Sequence[int]]) -> dict[int, float]:
    """Reciprocal rank fusion: key → the sum of 1 / (60 + rank) over the lists that have it, ranks from 1."""
    values: dict[int, float] = {}
    for keys in lists:
        for rank, key in enumerate(keys, 1):
            values[key] = values.get(key, 0.0) + 1 / (RANK_CONSTANT + rank)
    return values
