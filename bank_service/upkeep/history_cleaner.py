"""Removes expired past versions from the catalog, and then the gradients that no document names any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from bank_service.catalog.contract import Catalog
from bank_service.catalog.nodes import leads
from bank_service.errors import BankError
from bank_service.runtime.background import cancelled

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 5.0  # between two rounds; a version may stay so much longer
STEP = 256  # versions dropped in one write


class HistoryCleaner:
    """Drops expired versions, in one task. A crash may leave gradients. The sweep at the next start removes them."""

    def __init__(self, catalog: Catalog, discard: Callable[[Iterable[str]], Awaitable[None]]) -> None:
        """``discard`` removes gradients that neither a document nor a past version names."""
        self._catalog = catalog
        self._discard = discard
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-history-cleaner")

    async def stop(self) -> None:
        await cancelled(self._task)
        self._task = None

    async def clean(self) -> None:
        """Drops every expired version. If the bank keeps no history, all past versions are expired."""
        seconds = self._catalog.history_seconds
        before_us = (time.time_ns() // 1000 - seconds * 1_000_000) if seconds else None
        while (digests := await asyncio.wrap_future(self._catalog.expire_history(before_us, STEP))) is not None:
            await self._discard(digests)

    async def _run(self) -> None:
        while True:
            try:
                if leads(self._catalog):
                    await self.clean()
                    if not self._catalog.history_seconds:
                        return  # no more versions will come
            except BankError as error:  # versions only stay a little longer
                logger.warning("expired versions can't be dropped now: %s; trying again", error)
            except Exception:
                logger.exception("expired versions could not be dropped; trying again")
            await asyncio.sleep(CLEAN_SECONDS)
