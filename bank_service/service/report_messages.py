"""Reports on the wire: the bank's figures, and the progress of snapshots, recoding and upgrades."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from bank_service.backup.snapshot import Progress
from bank_service.bank_stats import BankStats
from bank_service.catalog.nodes import Replica
from bank_service.errors import InvalidArgumentError
from bank_service.upkeep.learner_upgrade import LearnerUpgrade, UpgradeProgress
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
        free_disk_bytes=stats.free_disk_bytes,
        removals_stopped=stats.removals_stopped,
        replica=None if stats.replica is None else _replica(stats.replica),
    )


def _replica(replica: Replica) -> pb.GetStatsResponse.Replica:
    counts, staleness = replica.counts, replica.staleness_seconds
    return pb.GetStatsResponse.Replica(
        is_up=replica.is_up,
        staleness_ms=None if staleness is None else round(staleness * 1000),
        num_reads=counts["replica"],
        num_behind=counts["behind"],
        num_down=counts["down"],
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


async def upgraded(upgrade: LearnerUpgrade, request: pb.UpgradeLearnerRequest) -> AsyncGenerator[UpgradeProgress, None]:
    """Does what the request asks for. InvalidArgumentError for an unknown action; the errors of the action."""
    if request.action == pb.UpgradeLearnerRequest.BEGIN:
        async for progress in upgrade.begin(request.learner):
            yield progress
    elif request.action == pb.UpgradeLearnerRequest.FINISH:
        yield await upgrade.finish()
    elif request.action == pb.UpgradeLearnerRequest.BACK:
        yield await upgrade.back()
    elif request.action == pb.UpgradeLearnerRequest.STATUS:
        yield await upgrade.progress()
    else:
        raise InvalidArgumentError(
            f"action must be one of STATUS, BEGIN, FINISH, BACK, got {request.action}", field="action"
        )


def upgrade_response(progress: UpgradeProgress) -> pb.UpgradeLearnerResponse:
    return pb.UpgradeLearnerResponse(
        learner_fingerprint=progress.learner,
        next_fingerprint=progress.next_learner,
        num_versions=progress.num_versions,
        num_done=progress.num_done,
        is_level=progress.is_level,
        problem=progress.problem,
    )
