"""Answers several queries in one message. Either all succeed or none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from bank_service.errors import BankError, InvalidArgumentError, LimitExceededError, NotFoundError, OutOfRangeError
from bank_service.records.record_reader import RecordReader
from bank_service.search.queries import MESSAGE_RESERVE_BYTES, text_bytes_of
from bank_service.values.documents import Query, QueryResult
from bank_service.wire import limits

HIT_BYTES = 512  # upper bound for the id, digest, scores and framing of one hit
MAX_TRIES = 5  # attempts at a batch whose hits change between the search and the read of their gradients
CONCURRENCY = 4  # queries of one batch that run at once; the pool's other threads serve other calls


async def answer_batch(
    batch: Sequence[Query],
    search: Callable[[Query], Awaitable[QueryResult]],
    records: RecordReader,
) -> tuple[QueryResult, ...]:
    """Answers each query, in order. ``search`` finds the hits of one.

    Raises the error of the first query that fails, with its index.
    LimitExceededError if the answers don't fit one message.
    """
    turns = asyncio.Semaphore(CONCURRENCY)

    async def answer(index: int, query: Query) -> QueryResult:
        try:
            async with turns:
                return await search(query)
        except BankError as error:
            raise placed(error, index) from error

    for last_try in (*(False,) * (MAX_TRIES - 1), True):
        answers = await asyncio.gather(
            *(answer(index, query) for index, query in enumerate(batch)), return_exceptions=True
        )
        results = []
        for found in answers:
            if isinstance(found, BaseException):
                raise found
            results.append(found)
        _check_size(batch, results)
        try:
            return tuple(
                [
                    replace(result, records=await records.read(_digests(query, result)))
                    for query, result in zip(batch, results, strict=True)
                ]
            )
        except NotFoundError:  # a hit was updated or deleted after the search: search again
            if last_try:
                raise
            batch = [replace(query, at_least=None) for query in batch]
    raise AssertionError("unreachable")


def placed(error: BankError, index: int) -> BankError:
    """The error of one query of a batch, with the query's index."""
    error.message = f"queries[{index}]: {error.message}"
    error.index = index
    if isinstance(error, InvalidArgumentError | OutOfRangeError):
        error.field = f"queries[{index}].{error.field}"
    return error


def _check_size(batch: Sequence[Query], results: Sequence[QueryResult]) -> None:
    num_bytes = sum(HIT_BYTES * len(result.hits) + text_bytes_of(result.hits) for result in results)
    for query, result in zip(batch, results, strict=True):
        if query.include_gradients:
            num_bytes += sum(hit.gradient_bytes for hit in result.hits)
    if num_bytes > limits.MAX_MESSAGE_BYTES - MESSAGE_RESERVE_BYTES:
        raise LimitExceededError(
            f"the answers' texts and gradients must fit a message of {limits.MAX_MESSAGE_BYTES} bytes together, got "
            f"{num_bytes}; ask fewer queries at once, for fewer hits, or leave out include_text and include_gradients",
            limit="max_message_bytes",
        )


def _digests(query: Query, result: QueryResult) -> list[str]:
    return [hit.gradient_digest for hit in result.hits] if query.include_gradients else []
