"""Answers queries. Other rooms search through this module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import Score
from bank_service.catalog.failures import document_not_found
from bank_service.errors import LimitExceededError, OverloadedError
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.runtime.threads import in_thread, stoppable_in_thread
from bank_service.search.nearest import Nearest
from bank_service.search.past import Past
from bank_service.search.present import Present
from bank_service.values.documents import Hit, Query, QueryResult
from bank_service.wire import limits
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

MAX_ATTEMPTS = 5  # searches of one query if documents change meanwhile
MESSAGE_RESERVE_BYTES = 256 * 2**10  # ids, digests, scores and framing of 64 hits


@dataclass(frozen=True, slots=True)
class _Attempt:
    result: QueryResult
    newer: int | None = None  # a stale attempt: the sequence that the vectors must reflect before the next one
    words: Mapping[int, float] | None = None  # see ``Ranked.words``


class Queries:
    """Finds documents. A query sees at least every change that was acknowledged before it began, but for reads of a
    replica."""

    def __init__(
        self,
        catalog: Catalog,
        nearest: Nearest,
        acknowledged: AcknowledgedSequence,
        pool: Executor,
        past_pool: Executor,
        max_past: int,
    ) -> None:
        """``past_pool`` runs queries with as_of. They may take long, and must not delay others.

        ``max_past`` is the number of them that may run or wait at once.
        """
        self._catalog = catalog
        self._nearest = nearest
        self._acknowledged = acknowledged
        self._present = Present(nearest, catalog.words)
        self._past = Past(catalog, nearest)
        self._pool = pool
        self._past_pool = past_pool
        self._max_past = max_past
        self._num_past = 0  # queries with as_of in progress

    async def check_namespace(self, query: Query) -> None:
        """NotFoundError for a namespace that never had a document. ReplicaReadError."""

        def check() -> None:
            with self._catalog.view(query.at_least) as view:
                view.check_namespace(query.namespace)

        await in_thread(self._pool, check)

    async def search(self, query: Query, vectors: FloatArray | None) -> QueryResult:
        """Finds the best hits of all vectors, (n, dimension) in float32. None: for the query's document_ids. Hits have
        no records.

        NotFoundError names the first unknown id. LimitExceededError if the texts don't fit one message. With ``as_of``
        also InvalidArgumentError, OutOfRangeError and OverloadedError. With ``at_least`` also ReplicaReadError.
        """
        if vectors is None:
            result = (await self._search(query, None)).result
        else:
            first, *others = vectors
            attempt = await self._search(query, first)
            result = attempt.result
            for vector in others:  # one after another: each answer may have many MB of text
                result = _best(query, result, (await self._search(query, vector, attempt.words)).result)
        text_bytes = text_bytes_of(result.hits)
        if text_bytes > limits.MAX_MESSAGE_BYTES - MESSAGE_RESERVE_BYTES:
            raise LimitExceededError(
                f"the hits' texts must fit a message of {limits.MAX_MESSAGE_BYTES} bytes, got {text_bytes}; "
                "ask for fewer hits or leave out include_text",
                limit="max_message_bytes",
            )
        return result

    async def _search(
        self, query: Query, vector: FloatArray | None, words: Mapping[int, float] | None = None
    ) -> _Attempt:
        if query.as_of is not None:
            return _Attempt(await self._search_past(query, query.as_of, vector))
        if vector is None:
            with span("catalog.read"):
                return _Attempt(await in_thread(self._pool, self._named, query))
        return await self._search_present(query, vector, words)

    def fitting(self, hits: Iterable[Hit]) -> list[str]:
        """The digests of the first hits, as many as fit one message with their gradients and all texts."""
        hits = tuple(hits)
        room = limits.MAX_MESSAGE_BYTES - MESSAGE_RESERVE_BYTES - text_bytes_of(hits)
        digests: list[str] = []
        for hit in hits:
            room -= hit.gradient_bytes
            if room < 0:
                break
            digests.append(hit.gradient_digest)
        return digests

    async def _search_past(self, query: Query, sequence: int, vector: FloatArray | None) -> QueryResult:
        if self._num_past >= self._max_past:
            raise OverloadedError(
                f"the bank takes {self._max_past} queries with as_of at a time and has as many; try again later",
                limit="max_past_queries",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        self._num_past += 1
        try:
            await in_thread(self._pool, self._past.check, query)
            if vector is not None:
                await self._nearest.reach(sequence)
            return await stoppable_in_thread(self._past_pool, partial(self._past.search, query, vector))
        finally:
            self._num_past -= 1

    async def _search_present(self, query: Query, vector: FloatArray, words: Mapping[int, float] | None) -> _Attempt:
        await self._nearest.reach(self._acknowledged.value)
        for _ in range(MAX_ATTEMPTS - 1):
            attempt = await in_thread(self._pool, self._attempt, query, vector, words)
            if attempt.newer is None:
                return attempt
            await self._nearest.reach(attempt.newer)
        # The documents change faster than the searches. The last search ranks the found ones by their present vectors,
        # and leaves deleted ones out.
        return await in_thread(self._pool, self._attempt, query, vector, words)

    def _attempt(self, query: Query, vector: FloatArray, words: Mapping[int, float] | None) -> _Attempt:
        with span("catalog.read"), self._catalog.view(query.at_least) as view:
            found = self._present.find(view, query, vector, words)
            if not found.scores:
                view.check_namespace(query.namespace)
            if query.include_text:
                scores = {found.candidates[key].sequence: score for key, score in found.scores.items()}
                hits = tuple(view.hits(scores, include_text=True))
            else:
                hits = tuple(found.candidates[key].hit(score) for key, score in found.scores.items())
            result = QueryResult(hits, {}, found.sequence)
            return _Attempt(result, view.sequence() if found.is_stale else None, found.words)

    def _named(self, query: Query) -> QueryResult:
        with self._catalog.view(query.at_least) as view:
            began = view.began(query.namespace, query.document_ids)
            for id in query.document_ids:
                if id not in began:
                    view.check_namespace(query.namespace)
                    raise document_not_found(query.namespace, id)
            hits = view.hits({began[id]: Score(1.0, 1.0) for id in query.document_ids}, query.include_text)
            return QueryResult(tuple(hits), {}, view.sequence())


def _best(query: Query, one: QueryResult, other: QueryResult) -> QueryResult:
    """The best hits of two searches for one query. A document has its best score."""
    best: dict[str, Hit] = {}
    for hit in (*one.hits, *other.hits):
        if hit.id not in best or (hit.score, hit.cosine) > (best[hit.id].score, best[hit.id].cosine):
            best[hit.id] = hit
    hits = sorted(best.values(), key=lambda hit: (-hit.score, hit.id))
    return QueryResult(tuple(hits[: query.top_k]), {}, min(one.sequence, other.sequence))


def text_bytes_of(hits: Iterable[Hit]) -> int:
    texts = (text for hit in hits for text in (hit.title, hit.text, *(sentence.text for sentence in hit.cue)))
    return sum(len(text.encode()) for text in texts)
