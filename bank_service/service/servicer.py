"""Protobuf in, bank call, protobuf out. Every domain error becomes a status here, by ``wire/errors.py``."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc

from bank_service.backup.snapshot import Progress
from bank_service.bank import Bank
from bank_service.errors import BankError, InternalError, InvalidArgumentError
from bank_service.runtime.metrics import BankMetrics
from bank_service.service.access import ALL_NAMESPACES, Authority, Scope
from bank_service.service.admission import Admission, Call
from bank_service.service.ingest_stream import Patience, acknowledge_in_order, uploads
from bank_service.service.query_messages import check_batch, queries_of, query_of, response_of
from bank_service.service.sending import Context, end_with, send
from bank_service.upkeep.recode import RecodeProgress
from bank_service.values.documents import Document, Outcome, PutResult
from bank_service.wire import limits
from bank_service.wire.errors import status_code
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc
from bank_service.wire.tracing import extract, span

logger = logging.getLogger(__name__)

DOCUMENT_WINDOW = 32  # documents of one stream under way
UPLOAD_WINDOW_BYTES = 32 * 2**20  # of records, of one stream under way

_OUTCOMES = {
    Outcome.CREATED: pb.IngestDocumentsResponse.CREATED,
    Outcome.UPDATED: pb.IngestDocumentsResponse.UPDATED,
    Outcome.UNCHANGED: pb.IngestDocumentsResponse.UNCHANGED,
}


class BankServicer(bank_pb2_grpc.BankServiceServicer):
    """The bank's methods on the wire. Streams are written to by hand, so that each call stays in one task."""

    def __init__(
        self,
        bank: Bank,
        metrics: BankMetrics,
        authority: Authority,
        admission: Admission,
        idle_seconds: float,
        unread_seconds: float,
    ) -> None:
        """After ``idle_seconds``, an ingest stream ends whose client does nothing. After ``unread_seconds``, any other
        stream ends whose client does not read."""
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
                document = _document(request.document)
                yield self._bank.put(document, _expected_version(request))

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
                document = _document(header.document)
                yield self._bank.put_gradient(document, record, tuple(header.embedding), _expected_version(header))

        async with self._answering(context, "IngestGradients") as call:
            call.caller.check_anywhere(Scope.WRITE)
            window = min(DOCUMENT_WINDOW, max(2, UPLOAD_WINDOW_BYTES // self._bank.max_upload_bytes))
            await self._acknowledge(context, acknowledge_in_order(puts(call), window, patience))

    async def _acknowledge(self, context: Context, results: AsyncGenerator[PutResult, None]) -> None:
        index = 0
        async with aclosing(results):
            async for result in results:
                try:
                    await send(context, _ingested(result), self._idle_seconds, "ingest_idle_seconds")
                except BankError as error:
                    error.index = index
                    raise
                index += 1

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: Context) -> pb.DeleteDocumentResponse:
        async with self._answering(context, "DeleteDocument") as call:
            call.check(Scope.WRITE, request.namespace)
            result = await self._bank.delete(
                request.namespace, request.id, _expected_version(request), purge=request.purge
            )
            return pb.DeleteDocumentResponse(version=result.version, sequence=result.sequence)

    async def GetDocument(self, request: pb.GetDocumentRequest, context: Context) -> pb.GetDocumentResponse:
        async with self._answering(context, "GetDocument") as call:
            call.check(Scope.READ, request.namespace)
            stored = await self._bank.get(request.namespace, request.id)
            document = stored.document
            response = pb.GetDocumentResponse(
                document=pb.Document(
                    namespace=document.namespace,
                    id=document.id,
                    title=document.title,
                    text=document.text,
                    metadata=dict(document.metadata),
                ),
                version=stored.version,
                gradient_digest=stored.gradient.digest,
                num_tokens=stored.gradient.num_tokens,
                truncated=stored.gradient.truncated,
                sequence=stored.sequence,
            )
            response.updated_at.FromMicroseconds(stored.updated_us)
            return response

    async def ListDocuments(self, request: pb.ListDocumentsRequest, context: Context) -> pb.ListDocumentsResponse:
        async with self._answering(context, "ListDocuments") as call:
            call.check(Scope.READ, request.namespace)
            if request.page_size > limits.MAX_PAGE_SIZE:
                raise InvalidArgumentError(
                    f"page_size must be at most {limits.MAX_PAGE_SIZE}, got {request.page_size}", field="page_size"
                )
            size = request.page_size or limits.DEFAULT_PAGE_SIZE
            entries = await self._bank.list(request.namespace, _id_of_token(request.page_token), size + 1)
            page = entries[:size]
            return pb.ListDocumentsResponse(
                documents=[
                    pb.ListDocumentsResponse.Entry(
                        id=entry.id,
                        title=entry.title,
                        version=entry.version,
                        gradient_digest=entry.gradient_digest,
                        num_text_bytes=entry.num_text_bytes,
                    )
                    for entry in page
                ],
                next_page_token=_token_of_id(page[-1].id) if len(entries) > size else "",
            )

    async def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        async with self._answering(context, "Query") as call:
            call.check(Scope.READ, request.namespace)
            result = await self._bank.query(query_of(request))
            return response_of(result, self._bank.identity.learner_fingerprint)

    async def BatchQuery(self, request: pb.BatchQueryRequest, context: Context) -> pb.BatchQueryResponse:
        async with self._answering(context, "BatchQuery") as call:
            check_batch(request)
            for query in request.queries:
                call.check(Scope.READ, query.namespace)
            results = await self._bank.query_batch(queries_of(request))
            fingerprint = self._bank.identity.learner_fingerprint
            return pb.BatchQueryResponse(responses=[response_of(result, fingerprint) for result in results])

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
            stats = await self._bank.stats(may_see)
            counts = stats.totals.num_documents
            return pb.GetStatsResponse(
                namespaces=[
                    pb.GetStatsResponse.Namespace(namespace=name, num_documents=count) for name, count in counts.items()
                ],
                num_documents=sum(counts.values()),
                num_gradients=stats.totals.num_gradients,
                gradient_bytes=stats.totals.gradient_bytes,
                sequence=stats.sequence,
                indexed_sequence=stats.indexed_sequence,
                learner_fingerprint=stats.identity.learner_fingerprint,
                layout_id=stats.identity.layout_id,
                codec=stats.identity.codec,
                embedder=stats.identity.embedder,
                embedding_dimension=stats.identity.embedding_dimension,
                cache_hits=stats.cache_hits,
                cache_misses=stats.cache_misses,
                cache_available=stats.cache_available,
                version=stats.version,
                num_past_versions=stats.totals.num_past_versions,
                oldest_as_of=stats.totals.oldest_as_of,
            )

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> None:
        async with self._answering(context, "CreateSnapshot") as call:
            call.check(Scope.ADMIN, ALL_NAMESPACES)
            async with aclosing(self._bank.snapshot(request.target)) as snapshot:
                async for progress in snapshot:
                    await self._send(context, _snapshot_progress(progress))

    async def RecodeCollection(self, request: pb.RecodeCollectionRequest, context: Context) -> None:
        async with self._answering(context, "RecodeCollection") as call:
            call.check(Scope.ADMIN, ALL_NAMESPACES)
            async with aclosing(self._bank.recode(request.codec)) as recoding:
                async for progress in recoding:
                    await self._send(context, _recode_progress(progress))

    async def _send(self, context: Context, answer: Any) -> None:
        await send(context, answer, self._unread_seconds, "unread_seconds")

    @asynccontextmanager
    async def _answering(self, context: Context, method: str) -> AsyncIterator[Call]:
        """Around a call: its caller and its permit, its span, its metrics, and its errors as statuses."""
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


def _document(message: pb.Document) -> Document:
    return Document(message.namespace, message.id, message.title, message.text, dict(message.metadata))


def _expected_version(
    message: pb.IngestDocumentsRequest | pb.IngestGradientsRequest.Header | pb.DeleteDocumentRequest,
) -> int | None:
    return message.expected_version if message.HasField("expected_version") else None


def _ingested(result: PutResult) -> pb.IngestDocumentsResponse:
    stored = result.stored
    return pb.IngestDocumentsResponse(
        namespace=stored.document.namespace,
        id=stored.document.id,
        version=stored.version,
        gradient_digest=stored.gradient.digest,
        outcome=_OUTCOMES[result.outcome],
        num_tokens=stored.gradient.num_tokens,
        truncated=stored.gradient.truncated,
        sequence=stored.sequence,
    )


def _snapshot_progress(progress: Progress) -> pb.CreateSnapshotResponse:
    manifest = progress.manifest
    return pb.CreateSnapshotResponse(
        num_gradients=progress.num_gradients,
        num_done=progress.num_done,
        num_copied=progress.num_copied,
        copied_bytes=progress.copied_bytes,
        is_whole=manifest is not None,
        sequence=manifest.sequence if manifest else 0,
        catalog_digest=manifest.catalog_digest if manifest else "",
    )


def _recode_progress(progress: RecodeProgress) -> pb.RecodeCollectionResponse:
    return pb.RecodeCollectionResponse(
        num_documents=progress.num_documents,
        num_done=progress.num_done,
        num_recoded=progress.num_recoded,
        num_failed=progress.num_failed,
        finished=progress.finished,
    )


def _token_of_id(id: str) -> str:
    return base64.urlsafe_b64encode(id.encode()).decode()


def _id_of_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"page_token must be one that ListDocuments returned, got {token[:80]!r}", field="page_token"
        ) from error
