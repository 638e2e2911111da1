"""Applies the catalog's changes to the index. Start-up, live changes and repair all work this way.

The follower reads the changes after the last sequence that the index reflects, and applies them in order.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import Change
from bank_service.errors import UnavailableError
from bank_service.runtime.background import cancelled
from bank_service.runtime.threads import ended_in_thread, in_thread
from bank_service.runtime.wakeup import WakeUp
from bank_service.search.usearch.usearch_index import UsearchIndex

logger = logging.getLogger(__name__)

CHANGES_PER_STEP = 512
MAX_LAG = 1024  # changes; if the index is further behind, writers wait, so that queries don't time out
SNAPSHOT_SHARE = 0.1  # of the vectors; so many changes make a snapshot due if that is more than ``snapshot_every``
RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 5.0
WAIT_SECONDS = 10.0  # the longest that a query waits for the index
MAX_FAILURES = 4  # in a row; after that, queries do not wait for the next attempt


def snapshot_after(snapshot_every: int, num_vectors: int) -> int:
    """The number of changes that make a snapshot due. For a large index it is a share of its vectors, which bounds the
    work."""
    return max(snapshot_every, math.ceil(SNAPSHOT_SHARE * num_vectors))


class IndexFollower:
    """Applies the catalog's changes to the index, from one task."""

    def __init__(
        self, catalog: Catalog, index: UsearchIndex, snapshot: Path, pool: Executor, snapshot_every: int
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._snapshot = snapshot
        self._pool = pool
        self._snapshot_every = snapshot_every
        self._moved = asyncio.Condition()
        self._stepping = asyncio.Lock()
        self._wake_up = WakeUp()
        self._task: asyncio.Task[None] | None = None
        self._saved_sequence = 0
        self._failures = 0  # failed attempts since the last success
        self._failure = ""  # the last error
        self.sequence = 0  # every change up to this one is in the index
        self.newest = 0  # no change after this one is in the index

    async def start(self) -> None:
        """Loads the snapshot, applies all later changes, then follows the catalog."""
        self.sequence = self.newest = await in_thread(self._pool, self._load)
        self._saved_sequence = self.sequence
        while await self._step():
            pass
        self._task = asyncio.create_task(self._follow(), name="bank-index-follower")

    async def stop(self) -> None:
        """Ends the task, applies the last changes and saves a snapshot."""
        if self._task is not None:
            await cancelled(self._task)
            self._task = None
            try:
                while await self._step():
                    pass
            except Exception:  # the next start applies the missing changes
                logger.exception("the index can't follow the catalog to its end; the next start goes on from there")
            await in_thread(self._pool, self._save)

    def wake(self) -> None:
        """Tells the follower that the catalog has changed."""
        self._wake_up.wake()

    def expect(self, sequence: int) -> None:
        """From now on, the index may have changes up to this one."""
        self.newest = max(self.newest, sequence)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Inside the block, the follower neither changes nor saves the index."""
        async with self._stepping:
            yield

    async def save(self) -> None:
        """Saves a snapshot of the present index, even if nothing changed since the last one. OSError."""
        async with self._stepping:
            await ended_in_thread(self._pool, self._write)

    async def reach(self, sequence: int) -> None:
        """Returns when the index reflects ``sequence``.

        UnavailableError if that takes too long. It comes at once if the last MAX_FAILURES attempts failed.
        """
        if self.sequence >= sequence:
            return
        self.wake()  # nobody else wakes the follower for a committed change that is not acknowledged yet
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._moved:
                await self._moved.wait_for(lambda: self.sequence >= sequence or self._failures >= MAX_FAILURES)
        except TimeoutError:
            raise UnavailableError(
                f"the index must reflect change {sequence}, got {self.sequence} after {WAIT_SECONDS} s; try again"
            ) from None
        if self.sequence < sequence:
            raise UnavailableError(
                f"the index must reflect change {sequence}, got {self.sequence}: it failed {self._failures} times in "
                f"a row, last with {self._failure}; the bank's log has the traceback"
            )

    async def keep_up(self, sequence: int) -> None:
        """Returns when the index is at most MAX_LAG changes behind ``sequence``. Returns at once if it can't follow
        now."""
        if self.sequence < sequence - MAX_LAG:
            async with self._moved:
                await self._moved.wait_for(lambda: self.sequence >= sequence - MAX_LAG or self._failures > 0)

    async def _follow(self) -> None:
        while True:
            await self._wake_up.sleep()
            try:
                while await self._step():
                    pass
            except Exception as error:
                # The catalog still has the changes, so another attempt is safe after any error.
                delay = min(RETRY_SECONDS * 2**self._failures, MAX_RETRY_SECONDS)
                logger.exception("the index can't follow the catalog; trying again in %.1f s", delay)
                await self._failed(error)
                await asyncio.sleep(delay)
                self._wake_up.wake()
            else:
                self._failures = 0

    async def _failed(self, error: Exception) -> None:
        async with self._moved:
            self._failures += 1
            self._failure = f"{type(error).__name__}: {error}"
            self._moved.notify_all()

    async def _step(self) -> bool:
        """Applies the next changes. False if there are none."""
        async with self._stepping:
            return await self._step_alone()

    async def _step_alone(self) -> bool:
        # The thread must have ended when this returns. ``stop`` saves next, and nothing may change the index meanwhile.
        sequence = await ended_in_thread(self._pool, self._advance, self.sequence)
        if sequence == self.sequence:
            return False
        async with self._moved:
            self.sequence = sequence
            self._moved.notify_all()
        if self.sequence - self._saved_sequence >= snapshot_after(self._snapshot_every, self._index.num_vectors()):
            await ended_in_thread(self._pool, self._save)
        return True

    def _advance(self, after_sequence: int) -> int:
        with self._catalog.view() as view:
            changes = view.changes(after_sequence, CHANGES_PER_STEP)
        if not changes:
            return after_sequence
        self.expect(changes[-1].sequence)
        self._apply(changes, lambda change: change.embedding is None, self._remove)
        self._apply(changes, lambda change: change.embedding is not None, self._put)
        return changes[-1].sequence

    def _apply(
        self, changes: list[Change], chosen: Callable[[Change], bool], act: Callable[[str, list[Change]], None]
    ) -> None:
        # Each document is at most once in ``changes``, so their order does not matter.
        spaces: dict[str, list[Change]] = {}
        for change in filter(chosen, changes):
            spaces.setdefault(change.namespace, []).append(change)
        for namespace, group in spaces.items():
            act(namespace, group)

    def _put(self, namespace: str, changes: list[Change]) -> None:
        vectors = np.stack([np.frombuffer(change.embedding or b"", dtype="<f4") for change in changes])
        self._index.put(namespace, [change.key for change in changes], vectors)

    def _remove(self, namespace: str, changes: list[Change]) -> None:
        self._index.remove(namespace, [change.key for change in changes])

    def _load(self) -> int:
        sequence = self._index.load(self._snapshot, self._catalog.collection_id)
        with self._catalog.view() as view:
            newest = view.sequence()
        if sequence > newest:
            logger.warning("the index snapshot is ahead of the catalog (a restored backup?); rebuilding it")
            self._index.clear()
            return 0
        return sequence

    def _save(self) -> None:
        if self.sequence == self._saved_sequence:
            return
        try:
            self._write()
        except OSError:
            logger.exception("the index snapshot could not be written; the next start rebuilds more from the catalog")

    def _write(self) -> None:
        self._index.save(self._snapshot, self._catalog.collection_id, self.sequence)
        self._saved_sequence = self.sequence
