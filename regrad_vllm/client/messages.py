"""Converts the client's values to protobuf messages, and the bank's messages to values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC
from typing import cast

from bank_service.errors import InvalidArgumentError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.limits import MAX_CHUNK_BYTES, MAX_TEXT_BYTES
from regrad_vllm.client.values import (
    Answer,
    BankTooOldError,
    Condition,
    CueSentence,
    Deletion,
    Document,
    Hit,
    ListedDocument,
    Outcome,
    Query,
    Receipt,
    RecodeProgress,
    ReplicaStats,
    SnapshotProgress,
    Stats,
    StoredDocument,
    UpgradeAction,
    UpgradeProgress,
)


def ingest_request(document: Document, namespace: str) -> pb.IngestDocumentsRequest:
    return pb.IngestDocumentsRequest(
        document=_document(document, namespace), expected_version=document.expected_version
    )


def gradient_requests(document: Document, record: bytes, namespace: str) -> Iterator[pb.IngestGradientsRequest]:
    """A document with its gradient: a header, then the record in chunks."""
    header = pb.IngestGradientsRequest.Header(
        document=_document(document, namespace),
        record_bytes=len(record),
        expected_version=document.expected_version,
    )
    yield pb.IngestGradientsRequest(header=header)
    for start in range(0, len(record), MAX_CHUNK_BYTES):
        yield pb.IngestGradientsRequest(chunk=record[start : start + MAX_CHUNK_BYTES])


def receipt_of(message: pb.IngestDocumentsResponse) -> Receipt:
    return Receipt(
        id=message.id,
        version=message.version,
        gradient_digest=message.gradient_digest,
        outcome=cast(Outcome, pb.IngestDocumentsResponse.Outcome.Name(message.outcome).lower()),
        num_tokens=message.num_tokens,
        truncated=message.truncated,
        sequence=message.sequence,
        relative_error=message.relative_error if message.HasField("relative_error") else None,
    )


def deletion_of(message: pb.DeleteDocumentResponse) -> Deletion:
    return Deletion(message.version, message.sequence)


def stored_document_of(message: pb.GetDocumentResponse) -> StoredDocument:
    document = message.document
    return StoredDocument(
        document=Document(document.id, document.text, document.title, dict(document.metadata)),
        version=message.version,
        gradient_digest=message.gradient_digest,
        updated_at=message.updated_at.ToDatetime(tzinfo=UTC),
        num_tokens=message.num_tokens,
        truncated=message.truncated,
        sequence=message.sequence,
    )


def list_request(
    namespace: str, page_size: int, conditions: Sequence[Condition], prefix: str, after: str
) -> pb.ListDocumentsRequest:
    return pb.ListDocumentsRequest(
        namespace=namespace, page_size=page_size, filter=_filter_of(conditions), prefix=prefix, after_id=after
    )


def listed_documents_of(page: pb.ListDocumentsResponse, prefix: str, after: str) -> Iterator[ListedDocument]:
    """The documents of a page. ValueError if the bank's version doesn't know prefix and after."""
    for entry in page.documents:
        if not entry.id.startswith(prefix) or entry.id.encode() <= after.encode():
            raise ValueError("the bank must know prefix and after, it listed other documents; update the bank")
        yield ListedDocument(
            entry.id, entry.title, entry.version, entry.gradient_digest, entry.num_text_bytes, dict(entry.metadata)
        )


def query_request(query: Query, learner_fingerprint: str) -> pb.QueryRequest:
    return pb.QueryRequest(
        namespace=query.namespace,
        text=query.text,
        document_ids=query.document_ids,
        top_k=0 if query.document_ids else query.top_k,
        min_score=query.min_score,
        learner_fingerprint=learner_fingerprint,
        include_text=query.with_text,
        retrieval="DENSE" if query.document_ids else query.retrieval.upper(),
        filter=_filter_of(query.conditions),
        as_of=query.as_of,
        with_cue=query.with_cue,
        cue_text=query.cue_text,
    )


def answer_of(message: pb.QueryResponse, query: Query) -> Answer:
    """The answer to ``query``. BankTooOldError if it should have a cue and the bank doesn't know cues."""
    hits = (
        Hit(
            id=hit.id,
            version=hit.version,
            score=hit.score,
            cosine=hit.cosine
            if hit.HasField("cosine")
            else hit.score,  # older banks send only a score, which is the cosine
            gradient_digest=hit.gradient_digest,
            gradient_bytes=hit.gradient_bytes,
            title=hit.title,
            text=hit.text,
            cue=tuple(CueSentence(item.start, item.end, item.text, item.score) for item in hit.cue),
        )
        for hit in message.hits
    )
    answer = Answer(tuple(hits), message.sequence)
    if query.with_cue and not message.with_cue:
        raise BankTooOldError(
            "the bank must find cues for with_cue, got an answer of a version without cues; update the bank", answer
        )
    return answer


def stats_of(message: pb.GetStatsResponse) -> Stats:
    return Stats(
        namespaces={entry.namespace: entry.num_documents for entry in message.namespaces},
        num_documents=message.num_documents,
        num_gradients=message.num_gradients,
        gradient_bytes=message.gradient_bytes,
        sequence=message.sequence,
        indexed_sequence=message.indexed_sequence,
        learner_fingerprint=message.learner_fingerprint,
        layout_id=message.layout_id,
        codec=message.codec,
        embedder=message.embedder,
        embedding_dimension=message.embedding_dimension,
        cache_hits=message.cache_hits,
        cache_misses=message.cache_misses,
        cache_available=message.cache_available,
        version=message.version,
        num_past_versions=message.num_past_versions,
        oldest_as_of=message.oldest_as_of,
        free_disk_bytes=message.free_disk_bytes,
        removals_stopped=message.removals_stopped,
        replica=_replica_of(message.replica) if message.HasField("replica") else None,
    )


def _replica_of(message: pb.GetStatsResponse.Replica) -> ReplicaStats:
    staleness_ms = message.staleness_ms if message.HasField("staleness_ms") else None
    return ReplicaStats(message.is_up, staleness_ms, message.num_reads, message.num_behind, message.num_down)


def snapshot_progress_of(message: pb.CreateSnapshotResponse) -> SnapshotProgress:
    return SnapshotProgress(
        num_gradients=message.num_gradients,
        num_done=message.num_done,
        num_copied=message.num_copied,
        copied_bytes=message.copied_bytes,
        is_whole=message.is_whole,
        sequence=message.sequence,
        catalog_digest=message.catalog_digest,
    )


def recode_progress_of(message: pb.RecodeCollectionResponse) -> RecodeProgress:
    return RecodeProgress(
        num_documents=message.num_documents,
        num_done=message.num_done,
        num_recoded=message.num_recoded,
        num_failed=message.num_failed,
        finished=message.finished,
    )


def upgrade_request(action: UpgradeAction, learner: str) -> pb.UpgradeLearnerRequest:
    """ValueError for an unknown action."""
    return pb.UpgradeLearnerRequest(action=action.upper(), learner=learner)


def upgrade_progress_of(message: pb.UpgradeLearnerResponse) -> UpgradeProgress:
    return UpgradeProgress(
        learner_fingerprint=message.learner_fingerprint,
        next_fingerprint=message.next_fingerprint,
        num_versions=message.num_versions,
        num_done=message.num_done,
        is_level=message.is_level,
        problem=message.problem,
    )


def _document(document: Document, namespace: str) -> pb.Document:
    """InvalidArgumentError for a text that may be too long for a message. The bank checks all other limits."""
    if len(document.text) > MAX_TEXT_BYTES:
        raise InvalidArgumentError(
            f"text must have at most {MAX_TEXT_BYTES} bytes, got {len(document.text)} characters; split the document",
            field="text",
        )
    return pb.Document(
        namespace=namespace,
        id=document.id,
        title=document.title,
        text=document.text,
        metadata=dict(document.metadata),
    )


def _filter_of(conditions: Sequence[Condition]) -> pb.Filter | None:
    if not conditions:
        return None
    kind = pb.Filter.Condition
    return pb.Filter(
        conditions=[kind(key=item.key, operator=item.operator.upper(), values=item.values) for item in conditions]
    )
