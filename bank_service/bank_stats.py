"""The figures of a bank."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from bank_service import __version__
from bank_service.catalog.entries import CollectionIdentity, Totals
from bank_service.records.record_reader import MayRead
from bank_service.records.stores import Stores
from bank_service.runtime.threads import in_thread


@dataclass(frozen=True, slots=True)
class BankStats:
    """A bank's documents and gradients, and the hits of its cache."""

    totals: Totals
    identity: CollectionIdentity
    sequence: int
    indexed_sequence: int
    cache_hits: int
    cache_misses: int
    cache_available: bool
    version: str


async def read_stats(
    stores: Stores, pool: Executor, identity: CollectionIdentity, indexed: int, may_see: MayRead | None
) -> BankStats:
    """Reads the figures from the stores. ``indexed`` is the last sequence that the vectors reflect. See ``Bank.stats``
    for ``may_see``."""

    def read() -> tuple[Totals, int]:
        with stores.catalog.view() as view:
            totals = view.totals(may_see)
            return totals, view.sequence() if may_see is None else view.sequence_of(totals.num_documents)

    totals, sequence = await in_thread(pool, read)
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
    )
