"""The bank as the plugin sees it: a query gives hits, a fetch gives records. grpc.aio, traced, with deadlines.

Failures are the bank's own errors (``bank_service.wire.errors``), whether the bank said so or the network did.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc

from bank_service.wire.channel import BankCredentials, open_aio_channel
from bank_service.wire.codec import GradientSpec, max_record_bytes, verify_record
from bank_service.wire.errors import DataLossError, from_rpc_error
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from bank_service.wire.tracing import inject
from regrad_vllm.naming import Operator, Retrieval


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that the bank found, without its gradient."""

    id: str
    version: int
    score: float  # what the bank ordered by: a cosine, BM25 or fused ranks; 1 for a document named by id
    cosine: float  # of the embeddings, in every retrieval: what weights are made of; 1 for a document named by id
    gradient_digest: str  # 64 hex digits
    gradient_bytes: int
    title: str  # empty unless the query asked for texts
    text: str


@dataclass(frozen=True, slots=True)
class Condition:
    """What one key of a document's metadata must be."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()  # one of them, or none of them; empty for present and absent


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for. Exactly one of ``text`` and ``document_ids`` is set."""

    namespace: str
    text: str = ""
    document_ids: tuple[str, ...] = ()
    top_k: int = 3
    min_score: float | None = None
    with_text: bool = False
    retrieval: Retrieval = "dense"
    conditions: tuple[Condition, ...] = ()  # all must hold; none with document_ids
    as_of: int | None = None  # a past sequence: what would have been answered then; None: now

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.document_ids):
            raise ValueError("a query must have either text or document_ids")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the bank found, and when that was so."""

    hits: tuple[Hit, ...]  # best first; documents named by id in the order named
    sequence: int  # of the last change that it reflects; as_of where that was given


class BankClient:
    """One channel to one bank. Made and used in one event loop."""

    def __init__(
        self, address: str, spec: GradientSpec, timeout_ms: int, credentials: BankCredentials | None = None
    ) -> None:
        """Without ``credentials``, as the environment says. OSError, ValueError where their files can't be used."""
        self._address = address
        self._spec = spec
        self._timeout_s = timeout_ms / 1000
        self._channel = open_aio_channel(address, credentials)
        self._stub = bank_pb2_grpc.BankServiceStub(self._channel)

    @property
    def address(self) -> str:
        return self._address

    async def query(self, query: Query) -> tuple[Hit, ...]:
        """The hits of ``answer`` alone. BankError."""
        return (await self.answer(query)).hits

    async def answer(self, query: Query) -> Answer:
        """What the bank has for the query. BankError."""
        request = bank_pb2.QueryRequest(
            namespace=query.namespace,
            text=query.text,
            document_ids=query.document_ids,
            top_k=0 if query.document_ids else query.top_k,
            min_score=query.min_score,
            learner_fingerprint=self._spec.fingerprint,
            include_text=query.with_text,
            retrieval="DENSE" if query.document_ids else query.retrieval.upper(),
            filter=_filter_of(query.conditions),
            as_of=query.as_of,
        )
        try:
            response = await self._stub.Query(request, timeout=self._timeout_s, metadata=tuple(inject()))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        hits = tuple(
            Hit(
                id=hit.id,
                version=hit.version,
                score=hit.score,
                cosine=hit.cosine if hit.HasField("cosine") else hit.score,  # a bank from before: dense only
                gradient_digest=hit.gradient_digest,
                gradient_bytes=hit.gradient_bytes,
                title=hit.title,
                text=hit.text,
            )
            for hit in response.hits
        )
        return Answer(hits, response.sequence)

    async def fetch(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
        """(digest, record) in the order asked for, each record checked to be one of this learner.

        That the bytes have the digest is checked where they are stored (``Arena``). BankError,
        GradientFormatError.
        """
        request = bank_pb2.FetchGradientsRequest(digests=digests)
        expected = iter(digests)
        try:
            call = self._stub.FetchGradients(request, timeout=self._timeout_s, metadata=tuple(inject()))
            buffer = bytearray()
            async for message in call:
                if message.record_bytes > max_record_bytes(self._spec):
                    raise _broken(message.digest, f"claims {message.record_bytes} bytes, more than any of this learner")
                if message.offset != len(buffer):
                    raise _broken(message.digest, f"has a hole: chunk at {message.offset}, {len(buffer)} bytes read")
                buffer += message.chunk
                if len(buffer) < message.record_bytes:
                    continue
                if message.digest != next(expected, None):
                    raise _broken(message.digest, "was not the one asked for")
                record = bytes(buffer)
                buffer.clear()
                await asyncio.to_thread(verify_record, record, self._spec)
                yield message.digest, record
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        missing = next(expected, None)
        if missing is not None:
            raise _broken(missing, "did not arrive")

    async def stats(self) -> bank_pb2.GetStatsResponse:
        """The bank's own figures. BankError."""
        try:
            request = bank_pb2.GetStatsRequest()
            call = self._stub.GetStats(request, timeout=self._timeout_s, metadata=tuple(inject()))
            response: bank_pb2.GetStatsResponse = await call
            return response
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def close(self) -> None:
        await self._channel.close()


def _filter_of(conditions: Sequence[Condition]) -> bank_pb2.Filter | None:
    if not conditions:
        return None
    kind = bank_pb2.Filter.Condition
    return bank_pb2.Filter(
        conditions=[kind(key=item.key, operator=item.operator.upper(), values=item.values) for item in conditions]
    )


def _broken(digest: str, what: str) -> DataLossError:
    return DataLossError(f"the bank's stream of gradient {digest} {what}; is it a bank of this version?", digest=digest)
