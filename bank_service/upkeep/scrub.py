"""Verifies every stored gradient, slowly, to find damage while it can still be repaired."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from bank_service.catalog.nodes import leads
from bank_service.errors import BankError, DataLossError, UnavailableError
from bank_service.records.stores import Stores
from bank_service.runtime.background import cancelled
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread
from bank_service.upkeep.repair import Mended

logger = logging.getLogger(__name__)

PAGE = 64  # digests read from the catalog at a time
REST_SECONDS = 3600.0  # between two passes
WAIT_SECONDS = 5.0  # until a store that is away is asked again


@dataclass(slots=True)
class ScrubCounts:
    """The counts of one pass over all gradients."""

    num_gradients: int = 0
    num_bytes: int = 0
    num_repaired: int = 0
    num_lost: int = 0


class Scrubber:
    """Verifies the blobs that the catalog names, at a limited rate, and repairs damaged ones."""

    def __init__(
        self, stores: Stores, mend: Callable[[str], Awaitable[Mended]], pool: Executor, mib_per_second: float
    ) -> None:
        self._stores = stores
        self._mend = mend
        self._pool = pool
        self._bytes_per_second = mib_per_second * 2**20
        self._outages = Seldom()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts one pass after the other, unless the rate is 0."""
        if self._bytes_per_second:
            self._task = asyncio.create_task(self._run(), name="bank-scrubber")

    async def stop(self) -> None:
        await cancelled(self._task)
        self._task = None

    async def run_once(self) -> ScrubCounts:
        """One pass. It may miss gradients that are written or deleted meanwhile."""
        counts = ScrubCounts()
        after = ""
        while page := await in_thread(self._pool, self._page, after):
            for digest, num_bytes in page.items():
                await self._check(digest, counts)
                counts.num_gradients += 1
                counts.num_bytes += num_bytes
                if self._bytes_per_second:
                    await asyncio.sleep(num_bytes / self._bytes_per_second)
            after = max(page)
        return counts

    async def _check(self, digest: str, counts: ScrubCounts) -> None:
        try:
            await self._read(digest)
        except DataLossError:
            try:
                mended = await self._mend(digest)
            except BankError as error:  # the pass goes on to the other gradients
                logger.error("gradient %s can't be made again: %s", digest, error)
                mended = Mended.LOST
            counts.num_repaired += mended is Mended.MADE
            counts.num_lost += mended is Mended.LOST

    async def _read(self, digest: str) -> None:
        """Waits until the store tells about the gradient. DataLossError."""
        while True:
            try:
                await in_thread(self._pool, self._stores.blobs.get, digest)
                return
            except UnavailableError as error:
                if self._outages.is_due():
                    logger.warning("the scrub waits: %s", error)
                await asyncio.sleep(WAIT_SECONDS)

    async def _run(self) -> None:
        while True:
            while not leads(self._stores.catalog):
                await asyncio.sleep(WAIT_SECONDS)
            try:
                counts = await self.run_once()
                logger.info("scrubbed: %s", counts)
            except Exception:
                logger.exception("the scrub failed; the next one starts in %.0f s", REST_SECONDS)
            await asyncio.sleep(REST_SECONDS)

    def _page(self, after: str) -> dict[str, int]:
        with self._stores.catalog.view() as view:
            return view.gradients(after, PAGE)
