"""Queries ``as_of`` an earlier sequence number: what they would have been answered then.

The past does not change, so each look at the catalog may be at another state of it, as long as the past asked for is
still known there: each batch has a look of its own, so that no state of the catalog is held for long. That makes the
index safe to use while others write: it is searched first and the catalog looked at after that, the living documents
before the past versions, so a document that changes in between stands in the catalog as a past version, and none is
missed. Where one of the answer is purged in between the search begins anew, as if it had never been there.

Equally near documents are cut by their ids, as ``retrieval`` cuts them. Where the index proposed, then or now, which of
them it proposed is chance, and the answer may have others of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

from bank_service.catalog.contract import Catalog, CatalogView
from bank_service.catalog.entries import Candidate, Score
from bank_service.errors import InvalidArgumentError, NotFoundError, OutOfRangeError
from bank_service.search.exact_vectors import ExactVectors
from bank_service.search.retrieval import GROWTH, MAX_PROPOSALS, SCAN_SIZE, candidates_of, cosines_of, depth_of
from bank_service.search.vector_index import VectorIndex
from bank_service.values.documents import Query, QueryResult
from bank_service.wire.codec import FloatArray
from bank_service.wire.tracing import span

BATCH = 500  # versions in memory at once, without their texts

GoOn = Callable[[], None]  # called between batches; raises where nobody waits for the answer any more


def _always() -> None:
    pass


class PastRetriever:
    """Answers queries that have ``as_of``. The index must reflect that sequence."""

    def __init__(self, catalog: Catalog, index: VectorIndex, exact: ExactVectors, exact_below: int) -> None:
        self._catalog = catalog
        self._index = index
        self._exact = exact
        self._exact_below = exact_below

    def check(self, query: Query) -> None:
        """InvalidArgumentError for a sequence to come; OutOfRangeError for one that is no longer known; NotFoundError
        for a namespace that never had a document."""
        with self._catalog.view() as view:
            view.check_namespace(query.namespace)
            _as_of(view, query)

    def search(self, query: Query, vector: FloatArray | None, go_on: GoOn = _always) -> QueryResult:
        """Hits for a vector, or, without one, for the query's document_ids, without records.

        The errors of ``check``; NotFoundError names the first id that did not exist then.
        """
        go_on()
        if vector is None:
            return self._named(query)
        while (result := self._attempt(query, vector, go_on)) is None:
            pass
        return result

    def _attempt(self, query: Query, vector: FloatArray, go_on: GoOn) -> QueryResult | None:
        """None where a document of the answer was purged on the way."""
        if self._index.size(query.namespace) <= self._exact_below:
            with span("exact.search"), self._catalog.view() as view:
                keys = self._exact.search(
                    view, query.namespace, vector, depth_of(query), lambda: _unchanged(view, query)
                )
                living = self._scan(query, vector, keys, go_on, view)  # of the same state: others may be as near
            return self._best(query, vector, living, go_on)
        with self._catalog.view() as view:
            few = _unchanged(view, query, SCAN_SIZE + 1)
        if len(few) <= SCAN_SIZE:
            return self._best(query, vector, self._scan(query, vector, few, go_on), go_on)
        return self._proposed(query, vector, go_on)

    def _proposed(self, query: Query, vector: FloatArray, go_on: GoOn) -> QueryResult | None:
        """By the index, which knows the living documents only; compares with all of them where it would take too many
        proposals to find enough that have not changed since."""
        count = depth_of(query) * GROWTH
        while count <= MAX_PROPOSALS:
            go_on()
            with span("index.search", count=count):
                keys = self._index.search(query.namespace, vector, count)[0].tolist()
            with span("catalog.past"), self._catalog.view() as view:
                found = view.among(keys, query.conditions, _as_of(view, query))
                living = candidates_of(view, list(found)) if len(found) >= depth_of(query) else None
            if living is not None:
                return self._best(query, vector, living.values(), go_on)
            count *= GROWTH
        with self._catalog.view() as view:
            keys = _unchanged(view, query)
        return self._best(query, vector, self._scan(query, vector, keys, go_on), go_on)

    def _scan(
        self, query: Query, vector: FloatArray, keys: Sequence[int], go_on: GoOn, view: CatalogView | None = None
    ) -> list[Candidate]:
        """The nearest of these; in ``view``, else in one for each batch."""
        with span("catalog.scan", num_documents=len(keys)):
            living: list[Candidate] = []
            for start in range(0, len(keys), BATCH):
                go_on()
                with nullcontext(view) if view is not None else self._catalog.view() as state:
                    as_of = _as_of(state, query)
                    batch = candidates_of(state, keys[start : start + BATCH]).values()
                # Without those that have changed by now: what they were is among the past versions.
                unchanged = [candidate for candidate in batch if candidate.sequence <= as_of]
                living = _nearest(query, vector, living, unchanged)
            return living

    def _best(self, query: Query, vector: FloatArray, living: Iterable[Candidate], go_on: GoOn) -> QueryResult | None:
        """The answer, from living documents among which the nearest unchanged ones are, and all past versions."""
        nearest = list(living)
        after = query.as_of
        assert after is not None
        while True:
            with self._catalog.view() as view:
                as_of = _as_of(view, query)
                found = view.past_candidates(query.namespace, as_of, query.conditions, after, BATCH)
                if found is None:
                    return _answer(view, query, vector, nearest)
            go_on()
            batch, after = found
            nearest = _nearest(query, vector, nearest, batch)

    def _named(self, query: Query) -> QueryResult:
        with span("catalog.past"), self._catalog.view() as view:
            as_of = _as_of(view, query)
            began = view.began(query.namespace, query.document_ids, as_of)
            for id in query.document_ids:
                if id not in began:
                    raise NotFoundError(
                        f"document {id!r} was not in namespace {query.namespace!r} as of {as_of}",
                        kind="document",
                        name=id,
                    )
            scores = {began[id]: Score(1.0, 1.0) for id in query.document_ids}
            return QueryResult(tuple(view.past_hits(scores, query.include_text)), {}, as_of)


def _as_of(view: CatalogView, query: Query) -> int:
    """The query's, which this state of the catalog must still, and already, know."""
    as_of = query.as_of
    assert as_of is not None
    newest = view.sequence()
    if as_of > newest:
        raise InvalidArgumentError(
            f"as_of must be at most {newest}, the sequence of the last change, got {as_of}; leave it out to ask about "
            "now",
            field="as_of",
        )
    oldest = view.horizon(query.namespace)
    if as_of < oldest:
        raise OutOfRangeError(
            f"as_of must be at least {oldest} in namespace {query.namespace!r}, got {as_of}: what some documents were "
            "before is no longer known; ask about a later state (a bank keeps the past with --history-seconds)",
            field="as_of",
            limit=oldest,
        )
    return as_of


def _unchanged(view: CatalogView, query: Query, limit: int | None = None) -> list[int]:
    """Keys of the documents that match and are what they were."""
    return view.matching(query.namespace, query.conditions, limit, query.as_of)


def _answer(view: CatalogView, query: Query, vector: FloatArray, nearest: list[Candidate]) -> QueryResult | None:
    """None where the catalog has one of the best no more."""
    cosines = _cosines(nearest, vector)
    ids = {candidate.sequence: candidate.id for candidate in nearest}
    best = sorted(cosines, key=lambda began: (-cosines[began], ids[began]))[: query.top_k]
    scores = {began: Score(cosines[began], cosines[began]) for began in best if cosines[began] >= query.min_score}
    hits = view.past_hits(scores, query.include_text)
    return QueryResult(tuple(hits), {}, _as_of(view, query)) if len(hits) == len(scores) else None


def _nearest(
    query: Query, vector: FloatArray, nearest: Iterable[Candidate], more: Iterable[Candidate]
) -> list[Candidate]:
    """Of both, as many as are needed to have the best among them."""
    # Each once: one that changed on the way was found living and is a past version, too.
    both = list({candidate.sequence: candidate for candidate in (*nearest, *more)}.values())
    cosines = _cosines(both, vector)
    return heapq.nsmallest(depth_of(query), both, key=lambda candidate: (-cosines[candidate.sequence], candidate.id))


def _cosines(candidates: Iterable[Candidate], vector: FloatArray) -> dict[int, float]:
    """By where each version began: a key may have a living and a past one."""
    return cosines_of({candidate.sequence: candidate for candidate in candidates}, vector)
