"""The methods of the gRPC service. Each reads a message, calls the bank, and sends a message.

``…_messages.py`` convert between messages and values. ``wire/errors.py`` turns every domain error into a status.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc

from bank_service.bank import Bank
from bank_service.errors import BankError, InternalError
from bank_service.runtime.metrics import BankMetrics
from bank_service.service.access import ALL_NAMESPACES, Authority, Scope
from bank_service.service.admission import Admission, Call
from bank_service.service.document_messages import (
    document_of,
    document_response,
    expected_version_of,
    ingested_response,
    list_response,
    page_of,
)
from bank_service.service.ingest_stream import Patience, acknowledge_in_order, uploads
from bank_service.service.query_messages import check_batch, conditions_of, queries_of, query_of, response_of
from bank_service.service.report_messages import (
    recode_response,
    snapshot_response,
    stats_response,
    upgrade_response,
    upgraded,
)
from bank_service.service.sending import Context, end_with, send
from bank_service.values.documents import PutResult
from bank_service.wire import limits
from bank_service.wire.errors import status_code
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc
from bank_service.wire.shown_sequence import shown_in
from bank_service.wire.tracing import extract, span

logger = logging.getLogger(__name__)

DOCUMENT_WINDOW = 32  # documents of one stream that are under way at once
UPLOAD_WINDOW_BYTES = 32 * 2**20  # bytes of one stream's records that are under way at once


class BankServicer(bank_pb2_grpc.BankServiceServicer):
    """The methods of the gRPC service. They write to streams directly, so that each call stays in one task."""

    def __init__(
        self,
        bank: Bank,
        metrics: BankMetrics,
        authority: Authority,
        admission: Admission,
        idle_seconds: float,
        unread_seconds: float,
    ) -> None:
        """An ingest stream ends if its client does nothing for ``idle_seconds``. Any other stream ends if its client
        does not read for ``unread_seconds``."""
        self._bank = bank
        self._idle_seconds = idle_seconds
        self._unread_seconds = unread_seconds
        self._metrics = metrics
        self._authority = authority
        self._admission = admission

    async def IngestDocuments(
        self, request_iterator: AsyncIterator[pb.IngestDocumentsRequest], context: Context
    ) -> None:
        patience = Patience(self._idle_seconds)

        async def puts(call: Call) -> AsyncIterator[Any]:
            async for request in patience.heard(request_iterator):
                call.check(Scope.WRITE, request.document.namespace)
                document = document_of(request.document)
                yield self._bank.put(document, expected_version_of(request))

        async with self._answering(context, "IngestDocuments") as call:
            call.caller.check_anywhere(Scope.WRITE)
            await self._acknowledge(context, acknowledge_in_order(puts(call), DOCUMENT_WINDOW, patience))

    async def IngestGradients(
        self, request_iterator: AsyncIterator[pb.IngestGradientsRequest], context: Context
    ) -> None:
        patience = Patience(self._idle_seconds)

        async def puts(call: Call) -> AsyncIterator[Any]:
            check = partial(call.check, Scope.WRITE)
            parts = patience.heard(request_iterator)
            async for header, record in uploads(parts, self._bank.max_upload_bytes, check):
                document = document_of(header.document)
                yield self._bank.put_gradient(document, record, tuple(header.embedding), expected_version_of(header))

        async with self._answering(context, "IngestGradients") as call:
            call.caller.check_anywhere(Scope.WRITE)
            window = min(DOCUMENT_WINDOW, max(2, UPLOAD_WINDOW_BYTES // self._bank.max_upload_bytes))
            await self._acknowledge(context, acknowledge_in_order(puts(call), window, patience))

    async def _acknowledge(self, context: Context, results: AsyncGenerator[PutResult, None]) -> None:
        index = 0
        async with aclosing(results):
            async for result in results:
                try:
                    await send(context, ingested_response(result), self._idle_seconds, "ingest_idle_seconds")
                except BankError as error:
                    error.index = index
                    raise
                index += 1

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: Context) -> pb.DeleteDocumentResponse:
        async with self._answering(context, "DeleteDocument") as call:
            call.check(Scope.WRITE, request.namespace)
            result = await self._bank.delete(
                request.namespace, request.id, expected_version_of(request), purge=request.purge
            )
            return pb.DeleteDocumentResponse(version=result.version, sequence=result.sequence)

    async def GetDocument(self, request: pb.GetDocumentRequest, context: Context) -> pb.GetDocumentResponse:
        async with self._answering(context, "GetDocument") as call:
            call.check(Scope.READ, request.namespace)
            return document_response(await self._bank.get(request.namespace, request.id))

    async def ListDocuments(self, request: pb.ListDocumentsRequest, context: Context) -> pb.ListDocumentsResponse:
        async with self._answering(context, "ListDocuments") as call:
            call.check(Scope.READ, request.namespace)
            after_id, size = page_of(request)
            conditions = conditions_of(request.filter)
            entries = await self._bank.list(request.namespace, after_id, size + 1, conditions, request.prefix)
            return list_response(entries, size)

    async def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        async with self._answering(context, "Query") as call:
            call.check(Scope.READ, request.namespace)
            result = await self._bank.query(query_of(request, shown_in(context.invocation_metadata())))
            return response_of(result, request.with_cue)

    async def BatchQuery(self, request: pb.BatchQueryRequest, context: Context) -> pb.BatchQueryResponse:
        async with self._answering(context, "BatchQuery") as call:
            check_batch(request)
            for query in request.queries:
                call.check(Scope.READ, query.namespace)
            shown = shown_in(context.invocation_metadata())
            results = await self._bank.query_batch(queries_of(request, shown))
            answered = zip(results, request.queries, strict=True)
            return pb.BatchQueryResponse(responses=[response_of(result, query.with_cue) for result, query in answered])

    async def FetchGradients(self, request: pb.FetchGradientsRequest, context: Context) -> None:
        async with self._answering(context, "FetchGradients") as call:
            may_read = None if call.caller.grant.sees_everything else call.caller.may_read
            async for digest, record in self._bank.fetch(list(request.digests), may_read, call.enter):
                for offset in range(0, len(record), limits.MAX_CHUNK_BYTES):
                    chunk = record[offset : offset + limits.MAX_CHUNK_BYTES]
                    part = pb.FetchGradientsResponse(
                        digest=digest, record_bytes=len(record), offset=offset, chunk=chunk
                    )
                    await self._send(context, part)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        async with self._answering(context, "GetStats") as call:
            may_see = None if call.caller.grant.sees_everything else call.caller.may_read
            return stats_response(await self._bank.stats(may_see))

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> None:
        async with self._answering(context, "CreateSnapshot") as call:
            call.check(Scope.ADMIN, ALL_NAMESPACES)
            async with aclosing(self._bank.snapshot(request.target)) as snapshot:
                async for progress in snapshot:
                    await self._send(context, snapshot_response(progress))

    async def RecodeCollection(self, request: pb.RecodeCollectionRequest, context: Context) -> None:
        async with self._answering(context, "RecodeCollection") as call:
            call.check(Scope.ADMIN, ALL_NAMESPACES)
            async with aclosing(self._bank.recode(request.codec)) as recoding:
                async for progress in recoding:
                    await self._send(context, recode_response(progress))

    async def UpgradeLearner(self, request: pb.UpgradeLearnerRequest, context: Context) -> None:
        async with self._answering(context, "UpgradeLearner") as call:
            call.check(Scope.ADMIN, ALL_NAMESPACES)
            async with aclosing(upgraded(self._bank.upgrade, request)) as states:
                async for state in states:
                    await self._send(context, upgrade_response(state))

    async def _send(self, context: Context, answer: Any) -> None:
        await send(context, answer, self._unread_seconds, "unread_seconds")

    @asynccontextmanager
    async def _answering(self, context: Context, method: str) -> AsyncIterator[Call]:
        """Runs a call inside the block: checks the caller, takes a permit, traces, measures, and sends errors as
        statuses."""
        started = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            metadata = context.invocation_metadata()
            with span(f"bank.{method}", extract(metadata)), self._admission.admitted(method) as permit:
                yield Call(self._authority.caller(metadata), permit)
        except BankError as error:
            code = status_code(error)
            if isinstance(error, InternalError):
                logger.error("%s failed: %s", method, error, exc_info=error.__cause__)
            await end_with(context, error)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            logger.exception("%s failed", method)
            await end_with(context, InternalError(f"{method} failed inside the bank; its log has the reason"))
        finally:
            self._metrics.called(method, code.name, time.monotonic() - started)
