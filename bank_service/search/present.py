"""Queries of the present, on one view of the catalog: first the candidates, then their order.

The vector store proposes documents. WordSearch proposes more if the query asks for words. Equally near documents are
ordered and cut by their ids. Only an approximate store may choose among them by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bank_service.catalog.contract import CatalogView, WordSearch
from bank_service.catalog.entries import Candidate, Score
from bank_service.search.nearest import Nearest, Neighbours
from bank_service.search.ranking import candidates_of, closest, cosines_of, depth_of
from bank_service.values.documents import Query, Retrieval
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

RANK_CONSTANT = 60  # of reciprocal rank fusion; the value of Cormack et al. (2009)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The documents that answer a query in one view."""

    scores: dict[int, Score]  # by key, best first
    words: Mapping[int, float]  # key → BM25 of the best documents by words, best first
    candidates: dict[int, Candidate]  # by key; all documents of ``scores`` and perhaps more
    sequence: int  # every change up to this one is reflected
    is_stale: bool  # vector store and view differ: a newer view may give another answer


class Present:
    """Finds and orders documents."""

    def __init__(self, nearest: Nearest, words: WordSearch) -> None:
        self._nearest = nearest
        self._words = words

    def find(
        self, view: CatalogView, query: Query, vector: FloatArray, words: Mapping[int, float] | None = None
    ) -> Ranked:
        """Finds the best ``top_k`` documents with at least ``min_score``. ``vector``: float32 (dimension,). ``view``
        must be fresh: nothing was read from it. ``words``: of an earlier ``Ranked`` for the same query."""
        depth = depth_of(query)
        proposed = self._proposed(view, query, vector, depth)
        dense = closest(view, proposed.keys, vector, depth)
        is_stale = (
            proposed.is_ahead
            or len(dense) < min(len(proposed.keys), depth)
            or any(candidate.sequence > proposed.sequence for candidate in dense.values())
        )
        if query.retrieval is Retrieval.DENSE:
            words = {}
        elif words is None:
            with span("catalog.words"):
                words = self._words.best(view, query.namespace, query.text, query.conditions, depth)
        else:
            present = view.among(list(words), query.conditions)  # documents may have changed since
            words = {key: score for key, score in words.items() if key in present}
        candidates = dense | candidates_of(view, [key for key in words if key not in dense])
        cosines = cosines_of(candidates, vector)
        if query.retrieval is Retrieval.LEXICAL:
            values = words
        elif query.retrieval is Retrieval.DENSE:
            values = {key: cosines[key] for key in dense}
        else:
            nearest = sorted(dense, key=lambda key: (-cosines[key], dense[key].id))
            values = _fused([nearest, list(words)])
        best = sorted(values, key=lambda key: (-values[key], candidates[key].id))[: query.top_k]
        scores = {key: Score(values[key], cosines[key]) for key in best if cosines[key] >= query.min_score}
        return Ranked(scores, words, candidates, proposed.sequence, is_stale)

    def _proposed(self, view: CatalogView, query: Query, vector: FloatArray, depth: int) -> Neighbours:
        if query.retrieval is Retrieval.LEXICAL:
            return Neighbours([], view.sequence())
        return self._nearest.nearest(view, query.namespace, vector, depth, query.conditions)


def _fused(lists: Sequence[Sequence[int]]) -> dict[int, float]:
    """Reciprocal rank fusion: key → the sum of 1 / (60 + rank) over the lists that have it, ranks from 1."""
    values: dict[int, float] = {}
    for keys in lists:
        for rank, key in enumerate(keys, 1):
            values[key] = values.get(key, 0.0) + 1 / (RANK_CONSTANT + rank)
    return values
