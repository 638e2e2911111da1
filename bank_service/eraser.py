"""Erases what a purge leaves behind its commit: bytes that no query finds, but that the bank's files still hold.

The catalog overwrites deleted content (``secure_delete``), but words stay in FTS5's segments until they are merged, old
pages in the write-ahead log until it is emptied, and the vector in the index: in memory and in its snapshot. A round
erases what all purges before it left; ``erasures`` in the catalog says what is left after a crash.

How long that takes: a round rewrites the namespaces' words and their part of the index's snapshot (about 1 s per GB),
and overwrites each removed vector whose place is free, in the milliseconds that adding one takes; where they are many,
the namespace's graph is built anew instead, each vector in it added once. Rounds are a fifth of the time at most, so a
purge's traces are gone ERASE_SECONDS and six rounds later: seconds in a bank of some thousand documents. What holds a
round up is tried again in the next: a reader at an older state of the catalog (the bank's own end within seconds), a
disk that fails, a rebuild of a namespace's index. Gradients that disk or cache refuse hold up nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor

from bank_service import erasures
from bank_service.background import cancelled
from bank_service.compaction import Compactor
from bank_service.discarder import Discarder
from bank_service.erasures import Erasure
from bank_service.errors import BankError
from bank_service.index_follower import IndexFollower
from bank_service.lexical_cleaner import LexicalCleaner
from bank_service.stores import Stores
from bank_service.threads import ended_in_thread, in_thread
from bank_service.usearch_index import UsearchIndex

logger = logging.getLogger(__name__)

ERASE_SECONDS = 1.0  # between two rounds, so that many purges share one
REST_FACTOR = 4  # a round rewrites whole files: at most a fifth of the time goes into it
MAX_PER_ROUND = 500  # purges
OVERWRITE_STEP = 128  # removed vectors; some tenths of a second, for which a bank that stops waits
MAX_OVERWRITTEN = 2_000  # removed vectors of a namespace; with more, and with more than the share below, it is rebuilt
MAX_OVERWRITTEN_SHARE = 0.1  # of its places, so that a rebuild takes ten times as long as overwriting them at most
STOP_SECONDS = 3.0


class Eraser:
    """Erases, and retries what ``Discarder`` could not remove, from one task."""

    def __init__(
        self,
        stores: Stores,
        discarder: Discarder,
        cleaner: LexicalCleaner,
        index: UsearchIndex,
        follower: IndexFollower,
        compactor: Compactor,
        pool: Executor,
    ) -> None:
        self._catalog = stores.catalog
        self._cache = stores.cache
        self._discarder = discarder
        self._cleaner = cleaner
        self._index = index
        self._follower = follower
        self._compactor = compactor
        self._pool = pool
        self._rewritten: set[int] = set()  # erasures whose words and vectors are gone from the files
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-eraser")

    async def stop(self) -> None:
        """Ends after a last round, as far as a few seconds go. What is left is done when the bank opens again."""
        await cancelled(self._task)
        self._task = None
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.erase()
        except (BankError, OSError, TimeoutError) as error:
            logger.warning("what purges left is not erased yet (%s); the next start goes on", error)

    async def erase(self) -> bool:
        """One round; false where something is left to be done in another."""
        await self._discarder.retry()
        pending, sequence = await in_thread(self._pool, self._pending)
        self._rewritten &= {erasure.number for erasure in pending}
        fresh = [erasure for erasure in pending if erasure.number not in self._rewritten]
        if fresh:
            await self._rewrite({erasure.namespace for erasure in fresh}, sequence)
            self._rewritten.update(erasure.number for erasure in fresh)
        if not pending:
            return True
        gone = await self._gradients_gone(pending)
        # The last step: all others write to the log.
        if not await asyncio.wrap_future(self._catalog.cut_log()):
            return False
        await asyncio.wrap_future(self._catalog.finish_erasures([erasure.number for erasure in gone]))
        return len(gone) == len(pending) < MAX_PER_ROUND

    async def _gradients_gone(self, pending: list[Erasure]) -> list[Erasure]:
        """Those of which neither blob store nor cache has a gradient that nobody names."""
        await self._discarder.discard([digest for erasure in pending for digest in erasure.digests])
        return [erasure for erasure in pending if self._discarder.is_done(erasure.digests)]

    async def _rewrite(self, namespaces: set[str], sequence: int) -> None:
        await self._cleaner.clean()
        await self._follower.reach(sequence)
        # A rebuild that began before the purge would bring the vector back, in its own removed places.
        async with self._compactor.turn:
            wasteful = self._index.wasteful(MAX_OVERWRITTEN_SHARE, MAX_OVERWRITTEN + 1)
            for namespace in namespaces:
                if namespace in wasteful:
                    await self._compactor.rebuild(namespace)
                    continue
                for _ in range(0, self._index.num_dead(namespace), OVERWRITE_STEP):
                    await ended_in_thread(self._pool, self._index.overwrite_removed, namespace, OVERWRITE_STEP)
            await self._follower.save()

    def _pending(self) -> tuple[list[Erasure], int]:
        with self._catalog.view() as view:
            return erasures.pending(view.connection, MAX_PER_ROUND)

    async def _run(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self.erase()
            except (BankError, OSError) as error:
                logger.warning("what purges left can't be erased now: %s; trying again", error)
            except Exception:
                logger.exception("what purges left can't be erased now; trying again")
            await asyncio.sleep(ERASE_SECONDS + REST_FACTOR * (time.monotonic() - started))
