"""Answers queries ``as_of`` an earlier sequence, from the bank's state at that sequence.

The answer has two sources. Living documents that have not changed since come from the vector store. Past versions
come from the catalog, which reads all that the namespace had.

The past does not change. So each batch may use a new view, if that view still knows the past, and no view is open for
long. The past versions are read last. A document that changes during the query is then among them, so none is missed.
If a document of the answer is purged meanwhile, the search begins again.

Equally near documents are ordered and cut by their ids, the same as in ``present``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from bank_service.catalog.contract import Catalog, CatalogView
from bank_service.catalog.entries import Candidate, Score
from bank_service.errors import InvalidArgumentError, NotFoundError, OutOfRangeError
from bank_service.search.nearest import Nearest
from bank_service.search.ranking import candidates_of, cosines_of, depth_of
from bank_service.values.documents import Query, QueryResult
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

GoOn = Callable[[], None]  # called between batches; it raises an error once the caller is gone
BATCH = 500  # versions in memory at once, without their texts


def _keep_on() -> None:
    pass


class Past:
    """Answers queries that have ``as_of``. The vector store must reflect that sequence."""

    def __init__(self, catalog: Catalog, nearest: Nearest) -> None:
        self._catalog = catalog
        self._nearest = nearest

    def check(self, query: Query) -> None:
        """InvalidArgumentError for a sequence in the future. OutOfRangeError for one that is no longer known.
        NotFoundError for a namespace that never had a document."""
        with self._catalog.view() as view:
            view.check_namespace(query.namespace)
            _as_of(view, query)

    def search(self, query: Query, vector: FloatArray | None, go_on: GoOn = _keep_on) -> QueryResult:
        """Finds hits for a vector, (dimension,) in float32. None: for the query's document_ids. Hits have no records.

        Raises the errors of ``check``. NotFoundError names the first id that did not exist then.
        """
        go_on()
        if vector is None:
            return self._named(query)
        while (result := self._attempt(query, vector, go_on)) is None:
            pass
        return result

    def _attempt(self, query: Query, vector: FloatArray, go_on: GoOn) -> QueryResult | None:
        """One search. None if a document of the answer was purged during the search."""
        nearest = self._living(query, vector, go_on)
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
            nearest = _merged(query, vector, nearest, batch)

    def _living(self, query: Query, vector: FloatArray, go_on: GoOn) -> list[Candidate]:
        """The nearest of the documents that have not changed since. Changed documents are among the past versions."""
        with self._catalog.view() as view:
            keys = self._nearest.nearest(
                view, query.namespace, vector, depth_of(query), query.conditions, query.as_of
            ).keys
            # Read the same view again. After a purge in between, other documents would be among the nearest.
            living = _unchanged(view, query, keys[:BATCH])
        for start in range(BATCH, len(keys), BATCH):
            go_on()
            with span("catalog.scan"), self._catalog.view() as view:
                batch = _unchanged(view, query, keys[start : start + BATCH])
            living = _merged(query, vector, living, batch)
        return living

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
            return QueryResult(tuple(view.hits(scores, query.include_text)), {}, as_of)


def _as_of(view: CatalogView, query: Query) -> int:
    """The query's ``as_of``, if this view knows that past. Raises the errors of ``Past.check``."""
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


def _unchanged(view: CatalogView, query: Query, keys: list[int]) -> list[Candidate]:
    """The documents among ``keys`` that have not changed since."""
    as_of = _as_of(view, query)
    return [candidate for candidate in candidates_of(view, keys).values() if candidate.sequence <= as_of]


def _answer(view: CatalogView, query: Query, vector: FloatArray, nearest: list[Candidate]) -> QueryResult | None:
    """Orders the candidates and makes the hits. None if the catalog no longer has one of them."""
    cosines = _cosines(nearest, vector)
    ids = {candidate.sequence: candidate.id for candidate in nearest}
    best = sorted(cosines, key=lambda began: (-cosines[began], ids[began]))[: query.top_k]
    scores = {began: Score(cosines[began], cosines[began]) for began in best if cosines[began] >= query.min_score}
    hits = view.hits(scores, query.include_text)
    return QueryResult(tuple(hits), {}, _as_of(view, query)) if len(hits) == len(scores) else None


def _merged(
    query: Query, vector: FloatArray, nearest: Iterable[Candidate], more: Iterable[Candidate]
) -> list[Candidate]:
    """The nearest candidates of both sources, ``depth_of(query)`` at most."""
    # Each version once: a document that changed during the query may be in both sources.
    both = list({candidate.sequence: candidate for candidate in (*nearest, *more)}.values())
    cosines = _cosines(both, vector)
    return heapq.nsmallest(depth_of(query), both, key=lambda candidate: (-cosines[candidate.sequence], candidate.id))


def _cosines(candidates: Iterable[Candidate], vector: FloatArray) -> dict[int, float]:
    """The sequence at which a version began → its cosine. A document may have two versions here, so its key is not
    enough."""
    return cosines_of({candidate.sequence: candidate for candidate in candidates}, vector)
