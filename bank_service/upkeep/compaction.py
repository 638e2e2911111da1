"""Gives the index the places of removed vectors back, while queries and changes go on.

usearch keeps a removed vector's node in the graph until a new vector takes its place. Where more are removed than
come, searches walk through them and memory stays: then the namespace's graph is built anew from the catalog beside
the old one, brought up to the last change, and put in its place.
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
from bank_service.search.index_follower import IndexFollower
from bank_service.search.usearch_index import UsearchIndex

logger = logging.getLogger(__name__)

DEAD_SHARE = 0.3  # of a namespace's places
MIN_DEAD = 1_000  # places; fewer are not worth a rebuild
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
        every: float = CHECK_SECONDS,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._follower = follower
        self._pool = pool
        self._every = every
        self._task: asyncio.Task[None] | None = None
        self.turn = asyncio.Lock()  # of who puts a namespace's graph in another's place
        self.num_compacted = 0  # namespaces rebuilt since the start

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="bank-compactor")

    async def stop(self) -> None:
        """A rebuild under way is given up."""
        await cancelled(self._task)
        self._task = None

    async def compact(self, namespace: str) -> None:
        """Rebuilds one namespace and puts it in the old one's place."""
        async with self.turn:
            await self.rebuild(namespace)

    async def rebuild(self, namespace: str) -> None:
        """As ``compact``, for who has the turn. Of what was removed before, nothing is left in the new graph."""
        fresh = self._index.empty_like()
        sequence = 0
        while (reached := await in_thread(self._pool, self._advance, fresh, namespace, sequence)) != sequence:
            sequence = reached
        # What came meanwhile, with the follower held: after it, the two hold the same or the fresh one is ahead.
        async with self._follower.paused():
            while (reached := await in_thread(self._pool, self._advance, fresh, namespace, sequence)) != sequence:
                sequence = reached
            self._index.take(namespace, fresh)
        self.num_compacted += 1
        logger.info("rebuilt the index of namespace %s: %d vectors", namespace, self._index.size(namespace))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            try:
                for namespace in await in_thread(self._pool, self._index.wasteful, DEAD_SHARE, MIN_DEAD):
                    await self.compact(namespace)
            except Exception:  # the old graph goes on serving
                logger.exception("a namespace's index could not be rebuilt; trying again")

    def _advance(self, fresh: UsearchIndex, namespace: str, after_sequence: int) -> int:
        """Applies the namespace's next changes; the sequence of the last."""
        with self._catalog.view() as view:
            changes = view.changes_of(namespace, after_sequence, CHANGES_PER_STEP)
        gone = [change.key for change in changes if change.embedding is None]
        fresh.remove(namespace, gone)
        living = [change for change in changes if change.embedding is not None]
        if living:
            fresh.put(namespace, [change.key for change in living], _vectors(living))
        return changes[-1].sequence if changes else after_sequence


def _vectors(changes: list[Change]) -> np.ndarray:
    return np.stack([np.frombuffer(change.embedding or b"", dtype="<f4") for change in changes])
