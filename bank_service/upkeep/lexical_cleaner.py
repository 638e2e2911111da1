"""Has the words of deleted texts leave the catalog's file, in steps between the catalog's other writes."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor

from bank_service.catalog.contract import Catalog
from bank_service.runtime.background import cancelled
from bank_service.runtime.threads import in_thread

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 1.0  # between two rounds, so that many deletions share one
REST_FACTOR = 10  # a merge rewrites its namespace's whole table: at most this share of the time goes into merging


class LexicalCleaner:
    """Merges the tables from which words were taken out, from one task. Goes on after a crash: the catalog counts."""

    def __init__(self, catalog: Catalog, pool: Executor) -> None:
        self._catalog = catalog
        self._pool = pool
        self._turn = asyncio.Lock()  # two at once would count the same removals twice
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-lexical-cleaner")

    async def stop(self) -> None:
        await cancelled(self._task)
        self._task = None

    async def clean(self) -> int:
        """Merges every table that has to be; how many."""
        async with self._turn:
            tables = await in_thread(self._pool, self._uncleaned)
            for number, num_removed in tables.items():
                first = True
                while not await asyncio.wrap_future(self._catalog.clean_words(number, num_removed, first=first)):
                    first = False
            return len(tables)

    def _uncleaned(self) -> dict[int, int]:
        with self._catalog.view() as view:
            return view.uncleaned_words()

    async def _run(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self.clean()
            except Exception:  # what was taken out is found by nobody meanwhile
                logger.exception("deleted words could not be cleaned out of the catalog; trying again")
            await asyncio.sleep(CLEAN_SECONDS + REST_FACTOR * (time.monotonic() - started))
