"""Erases the words of deleted texts from the catalog's files, in steps between the catalog's other writes."""

from __future__ import annotations

import asyncio
import logging
import time

from bank_service.catalog.contract import WordSearch
from bank_service.runtime.background import cancelled

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 1.0  # between two rounds, so that many deletions share one
REST_FACTOR = 10  # a round rewrites whole namespaces, so the pause is ten times as long as the round


class WordCleaner:
    """Cleans regularly, in one task."""

    def __init__(self, words: WordSearch) -> None:
        self._words = words
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-word-cleaner")

    async def stop(self) -> None:
        await cancelled(self._task)
        self._task = None

    async def _run(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self._words.clean()
            except Exception:  # no search finds the removed words meanwhile
                logger.exception("deleted words could not be cleaned out of the catalog; trying again")
            await asyncio.sleep(CLEAN_SECONDS + REST_FACTOR * (time.monotonic() - started))
