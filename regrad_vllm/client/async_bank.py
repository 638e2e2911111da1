"""The client of a bank for asynchronous programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from bank_service.wire.channel import open_aio_channel, open_channel
from bank_service.wire.credentials import BankCredentials
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc
from bank_service.wire.limits import DEFAULT_NAMESPACE, MAX_PAGE_SIZE
from bank_service.wire.ports import DEFAULT_BANK
from bank_service.wire.record import GradientSpec, verify_record
from bank_service.wire.shown_sequence import ShownSequence
from bank_service.wire.tracing import inject
from regrad_vllm.client import messages
from regrad_vllm.client.bank import GRADIENTS_IN_FLIGHT, IN_FLIGHT, as_query, credentials_of, needed, own_errors
from regrad_vllm.client.ingest_call import IngestCall
from regrad_vllm.client.records import RecordStream
from regrad_vllm.client.retries import DEFAULT_ATTEMPTS, retry_options
from regrad_vllm.client.values import (
    Answer,
    Condition,
    Deletion,
    Document,
    ListedDocument,
    Query,
    Receipt,
    RecodeProgress,
    SnapshotProgress,
    Stats,
    StoredDocument,
    UpgradeAction,
    UpgradeProgress,
)

T = TypeVar("T")


class AsyncBank:
    """The asynchronous ``Bank``, with the same arguments and errors. Make and use it in one event loop."""

    def __init__(
        self,
        address: str = DEFAULT_BANK,
        *,
        token: str | None = None,
        credentials: BankCredentials | None = None,
        spec: GradientSpec | None = None,
        timeout_ms: int | None = None,
        attempts: int = DEFAULT_ATTEMPTS,
    ) -> None:
        """The same arguments as ``Bank``. OSError, ValueError."""
        self.address = address
        self._spec = spec
        self._timeout_s = None if timeout_ms is None else timeout_ms / 1000
        self._credentials = credentials_of(token, credentials)
        self._channel = open_aio_channel(address, self._credentials, retry_options(attempts))
        self._stub = bank_pb2_grpc.BankServiceStub(self._channel)
        self._shown = ShownSequence()
        self._blocking: Any = None  # a channel for ingests, opened by the first one

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()
        if self._blocking is not None:
            self._blocking.close()

    def ingest(
        self,
        documents: Iterable[Document] | AsyncIterable[Document],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        in_flight: int = IN_FLIGHT,
    ) -> AsyncIterator[Receipt]:
        """See ``Bank.ingest``."""
        requests = ([messages.ingest_request(document, namespace)] async for document in _each(documents))
        return self._ingest("IngestDocuments", requests, in_flight)

    def ingest_gradients(
        self,
        gradients: Iterable[tuple[Document, bytes]] | AsyncIterable[tuple[Document, bytes]],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        in_flight: int = GRADIENTS_IN_FLIGHT,
    ) -> AsyncIterator[Receipt]:
        """See ``Bank.ingest_gradients``."""
        requests = (
            messages.gradient_requests(document, record, namespace) async for document, record in _each(gradients)
        )
        return self._ingest("IngestGradients", requests, in_flight)

    async def delete(
        self,
        id: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        purge: bool = False,
        expected_version: int | None = None,
    ) -> Deletion:
        """See ``Bank.delete``."""
        request = pb.DeleteDocumentRequest(namespace=namespace, id=id, purge=purge, expected_version=expected_version)
        with self._shown.change():
            deletion = messages.deletion_of(await self._ask(self._stub.DeleteDocument, request))
        self._shown.advance(deletion.sequence)
        return deletion

    async def get(self, id: str, *, namespace: str = DEFAULT_NAMESPACE) -> StoredDocument:
        """A document by its id. NotFoundError if there is none."""
        request = pb.GetDocumentRequest(namespace=namespace, id=id)
        return messages.stored_document_of(await self._ask(self._stub.GetDocument, request))

    async def list(
        self,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        page_size: int = MAX_PAGE_SIZE,
        conditions: Sequence[Condition] = (),
        prefix: str = "",
        after: str = "",
    ) -> AsyncIterator[ListedDocument]:
        """See ``Bank.list``."""
        request = messages.list_request(namespace, page_size, conditions, prefix, after)
        while True:
            page = await self._ask(self._stub.ListDocuments, request)
            for listed in messages.listed_documents_of(page, prefix, after):
                yield listed
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def query(self, query: Query | str) -> Answer:
        """See ``Bank.query``."""
        query = as_query(query)
        request = messages.query_request(query, self._learner)
        shown = self._shown.metadata(newest=query.newest)
        return messages.answer_of(await self._ask(self._stub.Query, request, shown), query)

    async def fetch(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
        """See ``Bank.fetch``."""
        spec = needed(self._spec)
        stream = RecordStream(digests, spec)
        with own_errors():
            async for message in self._call(self._stub.FetchGradients, pb.FetchGradientsRequest(digests=digests)):
                record = stream.add(message)
                if record is not None:
                    await asyncio.to_thread(verify_record, record, spec)
                    yield message.digest, record
        stream.end()

    async def stats(self) -> Stats:
        """The bank's statistics."""
        return messages.stats_of(await self._ask(self._stub.GetStats, pb.GetStatsRequest()))

    async def snapshot(self, target: str) -> AsyncIterator[SnapshotProgress]:
        """See ``Bank.snapshot``."""
        with own_errors():
            request = pb.CreateSnapshotRequest(target=target)
            async for message in self._stub.CreateSnapshot(request, metadata=tuple(inject())):
                yield messages.snapshot_progress_of(message)

    async def recode(self, codec: str) -> AsyncIterator[RecodeProgress]:
        """See ``Bank.recode``."""
        with own_errors():
            request = pb.RecodeCollectionRequest(codec=codec)
            async for message in self._stub.RecodeCollection(request, metadata=tuple(inject())):
                yield messages.recode_progress_of(message)

    async def upgrade(self, action: UpgradeAction = "status", learner: str = "") -> AsyncIterator[UpgradeProgress]:
        """See ``Bank.upgrade``."""
        with own_errors():
            request = messages.upgrade_request(action, learner)
            async for message in self._stub.UpgradeLearner(request, metadata=tuple(inject())):
                yield messages.upgrade_progress_of(message)

    @property
    def _learner(self) -> str:
        return self._spec.fingerprint if self._spec else ""

    def _call(self, method: Any, request: Any, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        return method(request, timeout=self._timeout_s, metadata=tuple(inject(metadata)))

    async def _ask(self, method: Any, request: Any, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        with own_errors():
            return await self._call(method, request, metadata)

    async def _ingest(
        self, method: str, requests: AsyncIterator[Iterable[Any]], in_flight: int
    ) -> AsyncIterator[Receipt]:
        if self._blocking is None:
            self._blocking = open_channel(self.address, self._credentials)
        stub = bank_pb2_grpc.BankServiceStub(self._blocking)
        call = IngestCall(getattr(stub, method), in_flight, tuple(inject()), self._shown)
        loop = asyncio.get_running_loop()
        # A thread of its own: the loop's pool has few, and the bank may take long to answer.
        waiting = ThreadPoolExecutor(1, "ingest-receipts")
        receiving = loop.run_in_executor(waiting, call.receive)
        taking: asyncio.Future[Iterable[Any] | None] | None = None  # the next document, on its way from the caller
        all_taken = False
        try:
            while True:  # an answer is given at once, also while the next document isn't there yet
                if taking is None and call.has_room and not all_taken:
                    taking = asyncio.ensure_future(_next(requests))
                going: list[asyncio.Future[Any]] = [receiving] if taking is None else [receiving, taking]
                await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED)
                if taking is not None and taking.done():
                    request, taking = taking.result(), None
                    if request is None:
                        all_taken = True
                        call.finish()
                    else:
                        call.send(request)
                if receiving.done():
                    receipt = receiving.result()
                    if receipt is None:
                        return
                    yield receipt
                    receiving = loop.run_in_executor(waiting, call.receive)
        finally:
            receiving.cancel()
            if taking is not None:
                taking.cancel()
            call.cancel()
            waiting.shutdown(wait=False)


async def _next(items: AsyncIterator[T]) -> T | None:
    """The next item. None at the end."""
    return await anext(items, None)


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
