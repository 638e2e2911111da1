"""The figures of a bank."""

from __future__ import annotations

import math
import shutil
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bank_service import __version__
from bank_service.catalog.entries import CollectionIdentity, Totals
from bank_service.catalog.nodes import Replica
from bank_service.records.record_reader import MayRead
from bank_service.records.stores import Stores
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.threads import in_thread
from bank_service.search.nearest import Nearest
from bank_service.upkeep.eraser import Eraser


@dataclass(frozen=True, slots=True)
class BankStats:
    """A bank's documents and gradients, the hits of its cache, and its disk."""

    totals: Totals
    identity: CollectionIdentity
    sequence: int
    indexed_sequence: int
    cache_hits: int
    cache_misses: int
    cache_available: bool
    version: str
    free_disk_bytes: int
    removals_stopped: bool
    replica: Replica | None = None


async def read_stats(
    stores: Stores,
    pool: Executor,
    identity: CollectionIdentity,
    indexed: int,
    data_dir: Path,
    may_see: MayRead | None,
) -> BankStats:
    """Reads the figures from the stores. ``indexed`` is the last sequence that the vectors reflect. See ``Bank.stats``
    for ``may_see``."""

    def read() -> tuple[Totals, int]:
        with stores.catalog.view() as view:
            totals = view.totals(may_see)
            return totals, view.sequence() if may_see is None else view.sequence_of(totals.num_documents)

    totals, sequence = await in_thread(pool, read)
    if stores.catalog.vectors is not None:
        indexed = sequence  # its vectors are in the same state, also those of other nodes
    counts = stores.cache.counts
    available = await stores.cache.is_available()
    return BankStats(
        totals,
        identity,
        sequence,
        indexed if may_see is None else min(sequence, indexed),
        counts.hits if may_see is None else 0,
        counts.misses if may_see is None else 0,
        available,
        __version__,
        _free_bytes(data_dir) if may_see is None else 0,
        stores.blobs.is_taken,
        stores.catalog.replica if may_see is None else None,
    )


def publish(
    metrics: BankMetrics,
    acknowledged: AcknowledgedSequence,
    nearest: Nearest,
    eraser: Eraser,
    stores: Stores,
    data_dir: Path,
) -> None:
    """Gives the metrics the figures that they read when they are asked for."""
    counts = stores.cache.counts
    metrics.removals_stopped.set_function(lambda: stores.blobs.is_taken)
    metrics.sequence.set_function(lambda: acknowledged.value)
    metrics.indexed_sequence.set_function(lambda: nearest.sequence)
    metrics.free_disk_bytes.set_function(lambda: _free_bytes(data_dir))
    metrics.erasures.set_function(lambda: eraser.num_pending)
    metrics.erasure_seconds.set_function(lambda: eraser.oldest_seconds)
    replica = stores.catalog.replica
    if replica is not None:
        metrics.replica_staleness.set_function(lambda: math.nan if (age := replica.staleness_seconds) is None else age)
        for outcome in replica.counts:
            metrics.replica_reads.labels(outcome).set_function(partial(replica.counts.__getitem__, outcome))
    metrics.cache.labels("hits").set_function(lambda: counts.hits)
    metrics.cache.labels("misses").set_function(lambda: counts.misses)
    metrics.cache.labels("corrupt").set_function(lambda: counts.corrupt)
    metrics.cache.labels("errors").set_function(lambda: counts.errors)


def _free_bytes(data_dir: Path) -> int:
    return max(1, shutil.disk_usage(data_dir).free)  # 0 on the wire: not told
