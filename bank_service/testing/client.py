"""A thin client of a bank. It raises the bank's errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc

from bank_service.wire.channel import open_aio_channel, open_channel
from bank_service.wire.credentials import BankCredentials
from bank_service.wire.errors import BankError, from_rpc_error
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc


class Client:
    def __init__(self, target: str, credentials: BankCredentials | None = None) -> None:
        self.target = target
        credentials = credentials or BankCredentials()
        self.channel = open_aio_channel(target, credentials)
        self._blocking = open_channel(target, credentials)
        self.stub = bank_pb2_grpc.BankServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        self._blocking.close()

    async def ingest(self, *documents: pb.Document | dict[str, Any]) -> list[pb.IngestDocumentsResponse]:
        """The responses in order. Raises the error that ended the stream."""
        return await self.ingest_requests(
            *(
                pb.IngestDocumentsRequest(document=pb.Document(**item) if isinstance(item, dict) else item)
                for item in documents
            )
        )

    async def ingest_requests(self, *requests: pb.IngestDocumentsRequest) -> list[pb.IngestDocumentsResponse]:
        async with own_errors():
            return [response async for response in self.stub.IngestDocuments(_stream(requests))]

    async def put(self, id: str, text: str, expected_version: int | None = None, **fields: Any) -> Any:
        document = pb.Document(id=id, text=text, **fields)
        request = pb.IngestDocumentsRequest(document=document, expected_version=expected_version)
        return (await self.ingest_requests(request))[0]

    async def upload(self, *parts: pb.IngestGradientsRequest) -> list[pb.IngestDocumentsResponse]:
        """One call of the blocking client. A cancelled upload cancels its call.

        grpc.aio can't do this: if the server ends the call early, it reports INTERNAL ('Failed "execute_batch"') and
        loses the server's own status.
        """
        call = bank_pb2_grpc.BankServiceStub(self._blocking).IngestGradients(iter(parts))
        async with own_errors():
            try:
                return await asyncio.to_thread(list, call)
            finally:
                call.cancel()  # does nothing if the call has ended

    async def delete(
        self, id: str, namespace: str = "", expected_version: int | None = None, purge: bool = False
    ) -> Any:
        request = pb.DeleteDocumentRequest(namespace=namespace, id=id, expected_version=expected_version, purge=purge)
        async with own_errors():
            return await self.stub.DeleteDocument(request)

    async def get(self, id: str, namespace: str = "") -> Any:
        async with own_errors():
            return await self.stub.GetDocument(pb.GetDocumentRequest(namespace=namespace, id=id))

    async def list(self, **fields: Any) -> Any:
        async with own_errors():
            return await self.stub.ListDocuments(pb.ListDocumentsRequest(**fields))

    async def query(self, **fields: Any) -> Any:
        async with own_errors():
            return await self.stub.Query(pb.QueryRequest(**fields))

    async def query_batch(self, *queries: dict[str, Any]) -> Any:
        request = pb.BatchQueryRequest(queries=[pb.QueryRequest(**fields) for fields in queries])
        async with own_errors():
            return (await self.stub.BatchQuery(request)).responses

    async def fetch(self, digests: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        """(digest, record) in the order of arrival. Each record is joined from its chunks."""
        records: list[tuple[str, bytearray]] = []
        async with own_errors():
            async for part in self.stub.FetchGradients(pb.FetchGradientsRequest(digests=digests)):
                if part.offset == 0:
                    records.append((part.digest, bytearray()))
                assert records[-1][0] == part.digest and len(records[-1][1]) == part.offset
                records[-1][1].extend(part.chunk)
                assert len(records[-1][1]) <= part.record_bytes
        return [(digest, bytes(record)) for digest, record in records]

    async def stats(self) -> Any:
        async with own_errors():
            return await self.stub.GetStats(pb.GetStatsRequest())

    async def refused(self, call: Any, kind: type[BankError]) -> Any:
        """Awaits ``call``, which must end with an error of that kind. Returns the error."""
        try:
            await call
        except kind as error:
            return error
        raise AssertionError(f"the call must end with {kind.__name__}")


@asynccontextmanager
async def own_errors() -> AsyncIterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


async def _stream(requests: Sequence[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


def upload_of(
    document: pb.Document,
    record: bytes,
    *,
    record_bytes: int | None = None,
    embedding: Sequence[float] = (),
    chunk_bytes: int = 100,
    expected_version: int | None = None,
) -> list[pb.IngestGradientsRequest]:
    """The messages of one gradient's upload."""
    header = pb.IngestGradientsRequest.Header(
        document=document,
        record_bytes=len(record) if record_bytes is None else record_bytes,
        embedding=embedding,
        expected_version=expected_version,
    )
    parts = [pb.IngestGradientsRequest(header=header)]
    for start in range(0, len(record), chunk_bytes):
        parts.append(pb.IngestGradientsRequest(chunk=record[start : start + chunk_bytes]))
    return parts
