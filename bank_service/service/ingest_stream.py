"""One ingest stream. Many documents are under way at once, and are acknowledged in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from bank_service.errors import BankError, DeadlineExceededError, InvalidArgumentError
from bank_service.values.documents import PutResult
from bank_service.wire import limits
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import HEADER_BYTES

Put = Coroutine[Any, Any, PutResult]
T = TypeVar("T")


class Patience:
    """Ends an ingest stream whose client does nothing for too long, because its permit is needed by others.

    gRPC's keepalive can't do this. It detects a client that answers no ping, because it is dead or cut off. A client
    that is alive but sends nothing answers every ping. Also, only the bank knows that a client waits for a put.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    async def heard(self, requests: AsyncIterator[T]) -> AsyncIterator[T]:
        """Passes ``requests`` on. Each request shows that the client is active."""
        async for request in requests:
            self.renew()
            yield request

    def renew(self) -> None:
        self._since = self._loop.time()

    async def of(self, waiting: Callable[[], Awaitable[T]]) -> T:
        """Awaits ``waiting`` and returns its result. DeadlineExceededError if the client is silent for too long."""
        while True:
            try:
                async with asyncio.timeout_at(self._since + self._seconds):
                    return await waiting()
            except TimeoutError:
                if self._loop.time() < self._since + self._seconds:
                    continue  # parts of a record arrived meanwhile
                raise DeadlineExceededError(
                    f"an ingest stream must send something or end within {self._seconds:g} s (ingest_idle_seconds) of "
                    "the last answer, got nothing; what was acknowledged is stored, send the rest on another stream"
                ) from None


async def acknowledge_in_order(
    puts: AsyncIterator[Put], window: int, patience: Patience
) -> AsyncGenerator[PutResult, None]:
    """Runs up to ``window`` of ``puts`` at once and gives their results in order.

    The first error comes after all results before it, with its index. ``puts`` itself may raise it, or one put. Later
    puts are cancelled; they may or may not have been stored. ``patience`` does not run out while a put is under way.
    """
    started: asyncio.Queue[asyncio.Task[PutResult] | BaseException | None] = asyncio.Queue(window)
    tasks: set[asyncio.Task[PutResult]] = set()
    reader = asyncio.create_task(_start_all(puts, started, tasks))
    index = 0
    try:
        while (item := await patience.of(started.get)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield await item
            patience.renew()
            tasks.discard(item)
            index += 1
    except BankError as error:
        error.index = index
        raise
    finally:
        reader.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(reader, *tasks, return_exceptions=True)


async def _start_all(
    puts: AsyncIterator[Put],
    started: asyncio.Queue[asyncio.Task[PutResult] | BaseException | None],
    tasks: set[asyncio.Task[PutResult]],
) -> None:
    try:
        async for put in puts:
            task = asyncio.create_task(put)
            tasks.add(task)
            await started.put(task)
    except Exception as error:  # noqa: BLE001 - the consumer raises it, in order
        await started.put(error)
    else:
        await started.put(None)


async def uploads(
    requests: AsyncIterator[pb.IngestGradientsRequest], max_bytes: int, check: Callable[[str], None]
) -> AsyncIterator[tuple[pb.IngestGradientsRequest.Header, bytes]]:
    """Gives each header with its whole record. InvalidArgumentError if parts are missing, too large or out of order.

    ``check`` gets each document's namespace before its record is read. Memory grows with the received bytes, not with
    the size that the header announces.
    """
    header: pb.IngestGradientsRequest.Header | None = None
    record = bytearray()
    async for request in requests:
        part = request.WhichOneof("part")
        if part == "header":
            if header is not None:
                yield header, _whole(header, record)
            header, record = request.header, bytearray()
            check(header.document.namespace)
            _check_size(header, max_bytes)
        elif part == "chunk":
            _append(header, record, request.chunk)
        else:
            raise InvalidArgumentError("each message must have a header or a chunk, got neither", field="part")
    if header is not None:
        yield header, _whole(header, record)


def _check_size(header: pb.IngestGradientsRequest.Header, max_bytes: int) -> None:
    if not HEADER_BYTES < header.record_bytes <= max_bytes:
        raise InvalidArgumentError(
            f"header.record_bytes must be in {HEADER_BYTES + 1}..{max_bytes} for this learner, "
            f"got {header.record_bytes}",
            field="header.record_bytes",
        )


def _append(header: pb.IngestGradientsRequest.Header | None, record: bytearray, chunk: bytes) -> None:
    if header is None:
        raise InvalidArgumentError("the first message must be a header, got a chunk", field="header")
    if len(chunk) > limits.MAX_CHUNK_BYTES:
        raise InvalidArgumentError(
            f"chunk must be at most {limits.MAX_CHUNK_BYTES} bytes, got {len(chunk)}", field="chunk"
        )
    if len(record) + len(chunk) > header.record_bytes:
        raise InvalidArgumentError(
            f"chunks must add up to header.record_bytes = {header.record_bytes}, got {len(record) + len(chunk)} so far",
            field="chunk",
        )
    record += chunk


def _whole(header: pb.IngestGradientsRequest.Header, record: bytearray) -> bytes:
    if len(record) != header.record_bytes:
        raise InvalidArgumentError(
            f"chunks must add up to header.record_bytes = {header.record_bytes}, got {len(record)}; "
            "was the upload cut off?",
            field="chunk",
        )
    return bytes(record)
