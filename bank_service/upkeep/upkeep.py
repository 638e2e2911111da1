"""What a bank does of itself, beside what it is asked: compacting, expiring, erasing."""

from __future__ import annotations

from concurrent.futures import Executor

from bank_service.records.discarder import Discarder
from bank_service.records.stores import Stores
from bank_service.search.index_follower import IndexFollower
from bank_service.search.usearch_index import UsearchIndex
from bank_service.upkeep.compaction import Compactor
from bank_service.upkeep.eraser import Eraser
from bank_service.upkeep.history_cleaner import HistoryCleaner
from bank_service.upkeep.lexical_cleaner import LexicalCleaner


class Upkeep:
    """Its workers, each a task of its own."""

    def __init__(
        self, stores: Stores, discarder: Discarder, index: UsearchIndex, follower: IndexFollower, pool: Executor
    ) -> None:
        self.compactor = Compactor(stores.catalog, index, follower, pool)
        self.word_cleaner = LexicalCleaner(stores.catalog, pool)
        self.history_cleaner = HistoryCleaner(stores.catalog, discarder.discard)
        self.eraser = Eraser(stores, discarder, self.word_cleaner, index, follower, self.compactor, pool)

    def start(self, *, expires_history: bool) -> None:
        """``expires_history``: past versions go when their time is over."""
        self.compactor.start()
        self.word_cleaner.start()
        if expires_history:
            self.history_cleaner.start()
        self.eraser.start()

    async def stop(self) -> None:
        """Before the index's follower, which they use."""
        await self.history_cleaner.stop()
        await self.eraser.stop()
        await self.word_cleaner.stop()
        await self.compactor.stop()
