"""The vector store in the bank's process. It searches exactly if that is fast enough.

- In a small namespace, it compares the query with every vector.
- If few documents match a filter, it compares the query with each of them.
- Otherwise the graph proposes documents. If too few of them match the filter, it proposes more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from pathlib import Path

from bank_service.catalog.contract import Catalog, CatalogView
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.search.nearest import Neighbours
from bank_service.search.usearch.compaction import Compactor
from bank_service.search.usearch.exact_vectors import ExactVectors
from bank_service.search.usearch.index_follower import IndexFollower
from bank_service.search.usearch.usearch_index import UsearchIndex
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

SCAN_SIZE = 5_000  # up to so many matching documents are compared; reading their vectors takes tens of milliseconds
MAX_PROPOSALS = 20_000  # of the graph, for one filtered query; after that, all matching documents are compared
GROWTH = 4  # factor of the number of proposals, from one search of the graph to the next


class UsearchNearest:
    """Implements ``search.nearest.Nearest``."""

    def __init__(
        self,
        catalog: Catalog,
        dimension: int,
        folder: Path,
        acknowledged: AcknowledgedSequence,
        pool: Executor,
        *,
        exact_below: int,
        snapshot_every: int,
    ) -> None:
        """``folder`` is for the snapshot. A namespace of at most ``exact_below`` documents is searched exactly.
        ``snapshot_every`` is the least number of changes between two snapshots."""
        self._exact = ExactVectors(dimension)
        self._exact_below = exact_below
        self._pool = pool
        self.index = UsearchIndex(dimension)
        self.follower = IndexFollower(catalog, self.index, folder, pool, snapshot_every)
        self.compactor = Compactor(catalog, self.index, self.follower, pool)
        acknowledged.on_advance(self.follower.wake)

    @property
    def sequence(self) -> int:
        return self.follower.sequence

    async def start(self) -> None:
        await self.follower.start()
        self.compactor.start()

    async def stop(self) -> None:
        await self.compactor.stop()
        await self.follower.stop()

    async def reach(self, sequence: int) -> None:
        await self.follower.reach(sequence)

    async def keep_up(self, sequence: int) -> None:
        await self.follower.keep_up(sequence)

    def nearest(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
    ) -> Neighbours:
        def matching(limit: int | None = None) -> list[int]:
            with span("catalog.filter"):
                return view.matching(namespace, conditions, limit, as_of)

        is_filtered = bool(conditions) or as_of is not None
        sequence = self.follower.sequence  # read before the search, which may miss later changes
        if self.index.size(namespace) <= self._exact_below:
            with span("exact.search"):
                keys = self._exact.search(view, namespace, vector, depth, matching if is_filtered else None)
            return Neighbours(keys, view.sequence())
        if not is_filtered:
            return Neighbours(self._search(namespace, vector, depth), sequence)
        few = matching(SCAN_SIZE + 1)
        if len(few) <= SCAN_SIZE:
            return Neighbours(few, view.sequence())
        proposed = self._proposed(view, namespace, vector, depth, conditions, as_of)
        if proposed is not None:
            return Neighbours(proposed, sequence, is_ahead=self.follower.newest > view.sequence())
        return Neighbours(matching(), view.sequence())

    async def erase(self, namespaces: Collection[str]) -> None:
        """Rebuilds the graphs that have removed vectors, then writes the snapshot.

        A rebuild takes as long as adding all vectors of the namespace.
        """
        # Look while no rebuild is under way. A rebuild that began before a removal has that vector in a dead node.
        async with self.compactor.lock:
            for namespace in set(self.index.wasteful(0.0, 1)).intersection(namespaces):
                await self.compactor.rebuild(namespace)
            await self.follower.save()

    def _search(self, namespace: str, vector: FloatArray, count: int) -> list[int]:
        with span("index.search", count=count):
            keys: list[int] = self.index.search(namespace, vector, count)[0].tolist()
            return keys

    def _proposed(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition],
        as_of: int | None,
    ) -> list[int] | None:
        """At least ``depth`` near and matching documents that the graph proposes. None if that takes too many
        proposals."""
        count = depth * GROWTH
        checked: set[int] = set()
        matching: set[int] = set()
        while count <= MAX_PROPOSALS:
            keys = self._search(namespace, vector, count)
            matching |= view.among([key for key in keys if key not in checked], conditions, as_of)
            checked.update(keys)
            found = [key for key in keys if key in matching]
            if len(found) >= depth:
                return found
            count *= GROWTH
        return None
