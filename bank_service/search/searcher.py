"""Queries against index and catalog: the index proposes, the catalog's float32 vectors decide."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import Score
from bank_service.catalog.failures import document_not_found
from bank_service.errors import LimitExceededError, OverloadedError
from bank_service.runtime.threads import in_thread, stoppable_in_thread
from bank_service.search.index_follower import IndexFollower
from bank_service.search.past import PastRetriever
from bank_service.search.retrieval import Retriever
from bank_service.values.documents import Hit, Query, QueryResult
from bank_service.wire import limits
from bank_service.wire.codec import FloatArray
from bank_service.wire.tracing import span

MAX_ATTEMPTS = 5  # searches again where documents change under a query
MESSAGE_RESERVE_BYTES = 256 * 2**10  # ids, digests, scores and framing of 64 hits


@dataclass(frozen=True, slots=True)
class _Attempt:
    result: QueryResult
    is_stale: bool  # a document found had changed since the index was read
    newest_sequence: int  # of the catalog, where it matters


class Searcher:
    """Finds documents. Reflects at least every change that was acknowledged before the search."""

    def __init__(
        self,
        catalog: Catalog,
        retriever: Retriever,
        past: PastRetriever,
        follower: IndexFollower,
        pool: Executor,
        past_pool: Executor,
        max_past: int,
    ) -> None:
        """``past_pool``: for queries as_of, which may take much longer than others and must not hold those up.

        ``max_past``: how many of them may be in progress or waiting.
        """
        self._catalog = catalog
        self._retriever = retriever
        self._past = past
        self._follower = follower
        self._pool = pool
        self._past_pool = past_pool
        self._max_past = max_past
        self._num_past = 0  # queries with as_of in progress
        self.acknowledged = 0  # sequence of the last change that a caller was told of

    def acknowledge(self, sequence: int) -> None:
        self.acknowledged = max(self.acknowledged, sequence)

    async def check_namespace(self, namespace: str) -> None:
        """NotFoundError."""

        def check() -> None:
            with self._catalog.view() as view:
                view.check_namespace(namespace)

        await in_thread(self._pool, check)

    async def search(self, query: Query, vector: FloatArray | None) -> QueryResult:
        """Hits for a vector, or, without one, for the query's document_ids, without records.

        NotFoundError names the first unknown id; LimitExceededError where the texts don't fit one message. With
        ``as_of``: InvalidArgumentError, OutOfRangeError, OverloadedError.
        """
        if query.as_of is not None:
            result = await self._as_of(query, query.as_of, vector)
        elif vector is None:
            with span("catalog.read"):
                result = await in_thread(self._pool, self._named, query)
        else:
            result = await self._nearest(query, vector)
        text_bytes = text_bytes_of(result.hits)
        if text_bytes > limits.MAX_MESSAGE_BYTES - MESSAGE_RESERVE_BYTES:
            raise LimitExceededError(
                f"the hits' texts must fit a message of {limits.MAX_MESSAGE_BYTES} bytes, got {text_bytes}; "
                "ask for fewer hits or leave out include_text",
                limit="max_message_bytes",
            )
        return result

    def fitting(self, hits: Iterable[Hit]) -> list[str]:
        """Digests of the first hits whose gradients fit one message together with the texts."""
        hits = tuple(hits)
        room = limits.MAX_MESSAGE_BYTES - MESSAGE_RESERVE_BYTES - text_bytes_of(hits)
        digests: list[str] = []
        for hit in hits:
            room -= hit.gradient_bytes
            if room < 0:
                break
            digests.append(hit.gradient_digest)
        return digests

    async def _as_of(self, query: Query, sequence: int, vector: FloatArray | None) -> QueryResult:
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
                if sequence > self._follower.sequence:
                    self._follower.wake()
                await self._follower.reach(sequence)
            return await stoppable_in_thread(self._past_pool, partial(self._past.search, query, vector))
        finally:
            self._num_past -= 1

    async def _nearest(self, query: Query, vector: FloatArray) -> QueryResult:
        await self._follower.reach(self.acknowledged)
        for _ in range(MAX_ATTEMPTS - 1):
            attempt = await in_thread(self._pool, self._attempt, query, vector)
            if not attempt.is_stale:
                return attempt.result
            # Committed, perhaps not yet acknowledged: nobody else wakes the follower for certain.
            self._follower.wake()
            await self._follower.reach(attempt.newest_sequence)
        # Documents that change faster than this are ranked by what they are now; deleted ones are left out.
        return (await in_thread(self._pool, self._attempt, query, vector)).result

    def _attempt(self, query: Query, vector: FloatArray) -> _Attempt:
        indexed = self._follower.sequence
        with span("catalog.read"), self._catalog.view() as view:
            found = self._retriever.find(view, query, vector, indexed)
            if not found.scores:
                view.check_namespace(query.namespace)
            if query.include_text:
                hits = tuple(view.hits(found.scores, include_text=True))
            else:
                hits = tuple(found.candidates[key].hit(score) for key, score in found.scores.items())
            newest = view.sequence() if found.is_stale or query.conditions else found.sequence
            # Where a filter was read from the view before the index was searched, the index may be ahead of the view.
            is_ahead = bool(query.conditions) and self._follower.sequence > newest
            return _Attempt(QueryResult(hits, {}, found.sequence), found.is_stale or is_ahead, newest)

    def _named(self, query: Query) -> QueryResult:
        with self._catalog.view() as view:
            keys = view.keys(query.namespace, query.document_ids)
            for id in query.document_ids:
                if id not in keys:
                    view.check_namespace(query.namespace)
                    raise document_not_found(query.namespace, id)
            hits = view.hits({keys[id]: Score(1.0, 1.0) for id in query.document_ids}, query.include_text)
            return QueryResult(tuple(hits), {}, view.sequence())


def text_bytes_of(hits: Iterable[Hit]) -> int:
    return sum(len(hit.title.encode()) + len(hit.text.encode()) for hit in hits)
