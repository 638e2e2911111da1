"""Reports on the wire: the bank's figures, and the progress of snapshots and recoding."""

from __future__ import annotations

from bank_service.backup.snapshot import Progress
from bank_service.bank_stats import BankStats
from bank_service.upkeep.recode import RecodeProgress
from bank_service.wire.generated import bank_pb2 as pb


def stats_response(stats: BankStats) -> pb.GetStatsResponse:
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


def snapshot_response(progress: Progress) -> pb.CreateSnapshotResponse:
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


def recode_response(progress: RecodeProgress) -> pb.RecodeCollectionResponse:
    return pb.RecodeCollectionResponse(
        num_documents=progress.num_documents,
        num_done=progress.num_done,
        num_recoded=progress.num_recoded,
        num_failed=progress.num_failed,
        finished=progress.finished,
    )
