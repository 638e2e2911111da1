"""Frees the nodes of removed vectors, while queries and changes go on.

usearch keeps the node of a removed vector until a new vector takes it. If many vectors are removed and few are added,
searches walk through dead nodes, and the memory stays in use. Then the compactor builds a new graph from the catalog,
applies the last changes, and replaces the old graph. It does the same once with each graph of an older version.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

import numpy as np

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import Change
from bank_service.runtime.background import cancelled
from bank_service.runtime.threads import in_thread
from bank_service.search.usearch.index_follower import IndexFollower
from bank_service.search.usearch.usearch_index import UsearchIndex

logger = logging.getLogger(__name__)

DEAD_SHARE = 0.3  # of a namespace's nodes
MIN_DEAD = 1_000  # nodes; fewer are not worth a rebuild
CHANGES_PER_STEP = 512
CHECK_SECONDS = 5.0


class Compactor:
    """Rebuilds wasteful namespaces, one at a time, from one task."""

    def __init__(
        self,
        catalog: Catalog,
        index: UsearchIndex,
        follower: IndexFollower,
        pool: Executor,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._follower = follower
        self._pool = pool
        self._task: asyncio.Task[None] | None = None
        self.lock = asyncio.Lock()  # held while a graph is replaced or erased
        self.num_compacted = 0  # namespaces rebuilt since the start

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-compactor")

    async def stop(self) -> None:
        """Ends the task. A rebuild under way is abandoned."""
        await cancelled(self._task)
        self._task = None

    async def compact(self, namespace: str) -> None:
        """Rebuilds the graph of one namespace and replaces the old one."""
        async with self.lock:
            await self.rebuild(namespace)

    async def rebuild(self, namespace: str) -> None:
        """Does the same as ``compact``, for a caller that has ``lock``. The new graph has no removed vectors."""
        fresh = self._index.empty_like()
        sequence = await self._catch_up(fresh, namespace, 0)
        # Apply the last changes while the follower is paused. Then the fresh graph has the same vectors as the old one.
        async with self._follower.paused():
            sequence = await self._catch_up(fresh, namespace, sequence)
            self._follower.expect(sequence)
            self._index.take(namespace, fresh)
        self.num_compacted += 1
        logger.info("rebuilt the index of namespace %s: %d vectors", namespace, self._index.size(namespace))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                wasteful = await in_thread(self._pool, self._index.wasteful, DEAD_SHARE, MIN_DEAD)
                for namespace in wasteful:
                    await self.compact(namespace)
                if wasteful:
                    await self._follower.save()
            except Exception:  # the old graph stays in use
                logger.exception("a namespace's index could not be rebuilt; trying again")

    async def _catch_up(self, fresh: UsearchIndex, namespace: str, sequence: int) -> int:
        """Applies the changes after ``sequence`` until few are left, and returns the last applied sequence. With steady
        writes it might never apply all."""
        num_changes = CHANGES_PER_STEP
        while num_changes == CHANGES_PER_STEP:
            sequence, num_changes = await in_thread(self._pool, self._advance, fresh, namespace, sequence)
        return sequence

    def _advance(self, fresh: UsearchIndex, namespace: str, after_sequence: int) -> tuple[int, int]:
        """Applies the namespace's next changes. Returns (the sequence of the last one, their number)."""
        with self._catalog.view() as view:
            changes = view.changes_of(namespace, after_sequence, CHANGES_PER_STEP)
        gone = [change.key for change in changes if change.embedding is None]
        fresh.remove(namespace, gone)
        living = [change for change in changes if change.embedding is not None]
        if living:
            fresh.put(namespace, [change.key for change in living], _vectors(living))
        return changes[-1].sequence if changes else after_sequence, len(changes)


def _vectors(changes: list[Change]) -> np.ndarray:
    return np.stack([np.frombuffer(change.embedding or b"", dtype="<f4") for change in changes])
