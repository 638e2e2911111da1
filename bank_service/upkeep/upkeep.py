"""Starts and stops the bank's background workers: they clean, expire and erase."""

from __future__ import annotations

from concurrent.futures import Executor

from bank_service.records.discarder import Discarder
from bank_service.records.stores import Stores
from bank_service.search.nearest import Nearest
from bank_service.upkeep.eraser import Eraser
from bank_service.upkeep.history_cleaner import HistoryCleaner
from bank_service.upkeep.word_cleaner import WordCleaner


class Upkeep:
    """The background workers. Each runs in its own task."""

    def __init__(self, stores: Stores, discarder: Discarder, nearest: Nearest, pool: Executor) -> None:
        self.word_cleaner = WordCleaner(stores.catalog.words)
        self.history_cleaner = HistoryCleaner(stores.catalog, discarder.discard)
        self.eraser = Eraser(stores, discarder, nearest, pool)

    def start(self, *, expires_history: bool) -> None:
        """``expires_history``: also starts the worker that drops expired past versions."""
        self.word_cleaner.start()
        if expires_history:
            self.history_cleaner.start()
        self.eraser.start()

    async def stop(self) -> None:
        """Stops the workers. Call it before the vector store stops, because the eraser uses that store."""
        await self.history_cleaner.stop()
        await self.eraser.stop()
        await self.word_cleaner.stop()
