"""Erases the traces of purged data. After a purge's commit, no query finds the data, but files still have its bytes.

Each store erases by its own means. The catalog overwrites deleted rows, erases deleted words from its lists and
empties its log. A namespace's index is built again without the removed vectors. Gradients leave the blob store and the
cache. The catalog records the unfinished erasures, so a crash loses none.

Two kinds of copies remain: snapshots from before the purge, and the logs and backups of a store that the bank does not
control.

A round rewrites the words and the index of each namespace with a purge. It takes seconds for some thousand documents.
For more, it takes as long as adding all vectors of the namespace. Rounds take a fifth of the time at most.

Three things can block a round: a read of an older state of the catalog, a failing disk, or a snapshot under way. Reads
of the bank itself end within seconds. The next round tries again. A gradient that can't be removed blocks only its own
purge.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor

from bank_service.catalog.entries import Erasure
from bank_service.catalog.nodes import leads
from bank_service.errors import BankError
from bank_service.records.discarder import Discarder
from bank_service.records.stores import Stores
from bank_service.runtime.background import cancelled
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread
from bank_service.search.nearest import Nearest

logger = logging.getLogger(__name__)

ERASE_SECONDS = 1.0  # between two rounds, so that many purges share one
REST_FACTOR = 4  # the pause is four times as long as the round, because a round rewrites whole files
MAX_PER_ROUND = 500  # purges that a round rewrites for
STOP_SECONDS = 3.0
LATE_SECONDS = 60.0  # after so long, an unfinished purge is logged as a warning


class Eraser:
    """Erases in one task, for all nodes of a catalog. It also calls ``Discarder.retry``."""

    def __init__(
        self,
        stores: Stores,
        discarder: Discarder,
        nearest: Nearest,
        pool: Executor,
    ) -> None:
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._discarder = discarder
        self._nearest = nearest
        self._pool = pool
        self._rewritten = 0  # for erasures up to this number, words and vectors are gone from the files
        self._since: dict[int, float] = {}  # number of each unfinished erasure → the time when it was found, in order
        self._is_log_empty = False  # the catalog's log has no deleted data
        self._late = Seldom()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-eraser")

    async def stop(self) -> None:
        """Ends after a last round of a few seconds at most. The rest is erased when the bank opens again."""
        await cancelled(self._task)
        self._task = None
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.erase()
        except (BankError, OSError, TimeoutError) as error:
            logger.warning("the traces of purges are not all erased (%s); the next start goes on", error)
        except Exception:
            logger.exception("the traces of purges are not all erased; the next start goes on")

    @property
    def num_pending(self) -> int:
        """The number of unfinished purges that the last round found."""
        return len(self._since)

    @property
    def oldest_seconds(self) -> float:
        """The time since the oldest unfinished purge was found; 0 if there is none."""
        return time.monotonic() - next(iter(self._since.values())) if self._since else 0.0

    async def erase(self) -> bool:
        """One round. False if another round is needed, and this node does the upkeep."""
        async with self._lock:
            return await self._erase()

    async def _erase(self) -> bool:
        await self._discarder.retry()
        if not leads(self._catalog):
            self._since.clear()
            return True
        fresh, sequence = await in_thread(self._pool, self._look)
        if fresh:
            now = time.monotonic()
            for erasure in fresh:
                self._since.setdefault(erasure.number, now)
            self._is_log_empty = False
            await self._rewrite({erasure.namespace for erasure in fresh}, sequence)
            # Remove the gradients that no document names from blob store and cache. Failed removals are repeated.
            await self._discarder.discard((digest for erasure in fresh for digest in erasure.digests), at_once=True)
            self._rewritten = fresh[-1].number
        gone = await self._erased()
        if not await self._empty_log():
            return False
        await self._finish(gone)
        return await self._empty_log() and not self._since

    async def _erased(self) -> list[int]:
        """The numbers of the erasures that have no traces left, except in the catalog's log."""
        now = time.monotonic()
        since: dict[int, float] = {}
        gone: list[int] = []
        after = 0
        while page := await in_thread(self._pool, self._pending, after):
            for erasure in page:
                after = erasure.number
                since[after] = self._since.get(after, now)
                if after <= self._rewritten and self._discarder.is_done(erasure.digests):
                    gone.append(after)
        self._since = since
        return [] if self._blobs.is_holding_all else gone

    async def _finish(self, gone: list[int]) -> None:
        for start in range(0, len(gone), MAX_PER_ROUND):
            numbers = gone[start : start + MAX_PER_ROUND]
            await asyncio.wrap_future(self._catalog.finish_erasures(numbers))
            self._is_log_empty = False  # the log now has their digests
            for number in numbers:
                del self._since[number]

    async def _empty_log(self) -> bool:
        if not self._is_log_empty:
            self._is_log_empty = await asyncio.wrap_future(self._catalog.empty_log())
        return self._is_log_empty

    async def _rewrite(self, namespaces: set[str], sequence: int) -> None:
        await self._catalog.words.clean()
        await self._nearest.reach(sequence)
        await self._nearest.erase(namespaces)

    def _look(self) -> tuple[list[Erasure], int]:
        with self._catalog.view() as view:
            return view.pending_erasures(self._rewritten, MAX_PER_ROUND), view.sequence()

    def _pending(self, after: int) -> list[Erasure]:
        with self._catalog.view() as view:
            return view.pending_erasures(after, MAX_PER_ROUND)

    async def _run(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self.erase()
            except (BankError, OSError) as error:
                logger.warning("the traces of purges can't be erased now: %s; trying again", error)
            except Exception:
                logger.exception("the traces of purges can't be erased now; trying again")
            if self.oldest_seconds > LATE_SECONDS and self._late.is_due():
                logger.warning(
                    "%d purges are not erased yet, the oldest since %d s: a long read of the catalog, a snapshot, the "
                    "disk or the cache blocks them; trying again",
                    self.num_pending,
                    self.oldest_seconds,
                )
            await asyncio.sleep(ERASE_SECONDS + REST_FACTOR * (time.monotonic() - started))
