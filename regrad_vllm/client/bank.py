"""The client of a bank for blocking programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc

from bank_service.wire.channel import open_channel
from bank_service.wire.credentials import BankCredentials
from bank_service.wire.errors import from_rpc_error
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc
from bank_service.wire.limits import DEFAULT_NAMESPACE, MAX_PAGE_SIZE
from bank_service.wire.ports import DEFAULT_BANK
from bank_service.wire.record import GradientSpec, verify_record
from bank_service.wire.shown_sequence import ShownSequence
from bank_service.wire.tracing import inject
from regrad_vllm.client import messages
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

IN_FLIGHT = 64  # documents sent before the bank has answered
GRADIENTS_IN_FLIGHT = 8  # fewer, because each has megabytes


class Bank:
    """One connection to one bank, for any number of threads. Every method may raise any BankError."""

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
        """Connects at the first call. OSError or ValueError for an unusable token or file.

        address: host:port.
        credentials: files with token and certificates. None: those in the environment (REGRAD_BANK_*).
        token: replaces the token of the credentials.
        spec: the learner's gradients. A bank with another learner is then refused. ``fetch`` needs it.
        timeout_ms: limit for each call, except for ingests, snapshots and recoding. None: no limit.
        attempts: the most tries of a call while the bank is unavailable. Only calls that are safe to repeat are.
        """
        self.address = address
        self._spec = spec
        self._timeout_s = None if timeout_ms is None else timeout_ms / 1000
        self._channel = open_channel(address, credentials_of(token, credentials), retry_options(attempts))
        self._stub = bank_pb2_grpc.BankServiceStub(self._channel)
        self._shown = ShownSequence()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def ingest(
        self, documents: Iterable[Document], *, namespace: str = DEFAULT_NAMESPACE, in_flight: int = IN_FLIGHT
    ) -> Iterator[Receipt]:
        """Stores documents while you iterate over the result. It yields a receipt for each document, in order.

        At most ``in_flight`` documents are sent before their answers, and no more are in memory. A document with a
        receipt is stored. If the bank refuses a document, the error's ``index`` is its position.
        """
        requests = ([messages.ingest_request(document, namespace)] for document in documents)
        return self._ingest(self._stub.IngestDocuments, requests, in_flight)

    def ingest_gradients(
        self,
        gradients: Iterable[tuple[Document, bytes]],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        in_flight: int = GRADIENTS_IN_FLIGHT,
    ) -> Iterator[Receipt]:
        """Stores documents with gradients that are encoded already. Otherwise the same as ``ingest``.

        gradients: (document, record of its gradient).
        """
        requests = (messages.gradient_requests(document, record, namespace) for document, record in gradients)
        return self._ingest(self._stub.IngestGradients, requests, in_flight)

    def delete(
        self,
        id: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        purge: bool = False,
        expected_version: int | None = None,
    ) -> Deletion:
        """Deletes a document. NotFoundError if there is none.

        purge: also erases its past versions. expected_version: VersionConflictError if it has another version.
        """
        request = pb.DeleteDocumentRequest(namespace=namespace, id=id, purge=purge, expected_version=expected_version)
        with self._shown.change():
            deletion = messages.deletion_of(self._ask(self._stub.DeleteDocument, request))
        self._shown.advance(deletion.sequence)
        return deletion

    def get(self, id: str, *, namespace: str = DEFAULT_NAMESPACE) -> StoredDocument:
        """A document by its id. NotFoundError if there is none."""
        request = pb.GetDocumentRequest(namespace=namespace, id=id)
        return messages.stored_document_of(self._ask(self._stub.GetDocument, request))

    def list(
        self,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        page_size: int = MAX_PAGE_SIZE,
        conditions: Sequence[Condition] = (),
        prefix: str = "",
        after: str = "",
    ) -> Iterator[ListedDocument]:
        """The documents of a namespace in order of id, one page at a time. Concurrent changes may show or not.

        conditions: all must hold. A bank of an earlier version lists all documents, without metadata.
        prefix: the start of the ids. after: only ids after this one. ValueError from a bank that knows neither.
        """
        request = messages.list_request(namespace, page_size, conditions, prefix, after)
        while True:
            page = self._ask(self._stub.ListDocuments, request)
            yield from messages.listed_documents_of(page, prefix, after)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def query(self, query: Query | str) -> Answer:
        """The documents nearest to a text, or the documents with given ids. A plain text asks for the 3 best.

        BankTooOldError if the query asks for a cue and the bank doesn't know cues.
        """
        query = as_query(query)
        request = messages.query_request(query, self._learner)
        shown = self._shown.metadata(newest=query.newest)
        return messages.answer_of(self._ask(self._stub.Query, request, shown), query)

    def fetch(self, digests: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """(digest, record) for each digest, in order. Each record is checked to be a gradient of this learner.

        The digest itself isn't checked. Use ``record_digest`` for that. GradientFormatError; ValueError without a spec.
        """
        spec = needed(self._spec)
        stream = RecordStream(digests, spec)
        with own_errors():
            for message in self._call(self._stub.FetchGradients, pb.FetchGradientsRequest(digests=digests)):
                record = stream.add(message)
                if record is not None:
                    verify_record(record, spec)
                    yield message.digest, record
        stream.end()

    def stats(self) -> Stats:
        """The bank's statistics."""
        return messages.stats_of(self._ask(self._stub.GetStats, pb.GetStatsRequest()))

    def snapshot(self, target: str) -> Iterator[SnapshotProgress]:
        """Writes a snapshot of the whole bank while you iterate over the result.

        target: an absolute folder on the bank's machine, or a URL.
        """
        with own_errors():
            request = pb.CreateSnapshotRequest(target=target)
            for message in self._stub.CreateSnapshot(request, metadata=tuple(inject())):
                yield messages.snapshot_progress_of(message)

    def recode(self, codec: str) -> Iterator[RecodeProgress]:
        """Gives every gradient another codec. The bank continues even if you stop the iteration."""
        with own_errors():
            request = pb.RecodeCollectionRequest(codec=codec)
            for message in self._stub.RecodeCollection(request, metadata=tuple(inject())):
                yield messages.recode_progress_of(message)

    def upgrade(self, action: UpgradeAction = "status", learner: str = "") -> Iterator[UpgradeProgress]:
        """Begins, finishes or takes back the bank's upgrade to another learner. All but "begin" give one report.

        learner: for "begin", an absolute folder on the bank's machine. The bank continues even if you stop the
        iteration.
        """
        with own_errors():
            request = messages.upgrade_request(action, learner)
            for message in self._stub.UpgradeLearner(request, metadata=tuple(inject())):
                yield messages.upgrade_progress_of(message)

    @property
    def _learner(self) -> str:
        return self._spec.fingerprint if self._spec else ""

    def _call(self, method: Any, request: Any, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        return method(request, timeout=self._timeout_s, metadata=tuple(inject(metadata)))

    def _ask(self, method: Any, request: Any, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        with own_errors():
            return self._call(method, request, metadata)

    def _ingest(self, method: Any, requests: Iterable[Iterable[Any]], in_flight: int) -> Iterator[Receipt]:
        call = IngestCall(method, in_flight, tuple(inject()), self._shown)
        try:
            for request in requests:
                call.send(request)
                while call.must_receive and (receipt := call.receive()):
                    yield receipt
            call.finish()
            while receipt := call.receive():
                yield receipt
        finally:
            call.cancel()


@contextmanager
def own_errors() -> Iterator[None]:
    """Turns gRPC errors of calls inside the context into BankError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def credentials_of(token: str | None, credentials: BankCredentials | None) -> BankCredentials:
    """The given credentials, or those in the environment. ``token`` replaces their token. ValueError."""
    found = BankCredentials.from_environment() if credentials is None else credentials
    return found if token is None else replace(found, token=token)


def as_query(query: Query | str) -> Query:
    return Query(query) if isinstance(query, str) else query


def needed(spec: GradientSpec | None) -> GradientSpec:
    """The spec. ValueError without one."""
    if spec is None:
        raise ValueError("fetch must know the learner whose gradients these are; give spec when the client is made")
    return spec
