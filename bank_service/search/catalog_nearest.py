"""The vector store of a catalog that has its vectors itself, such as one in PostgreSQL.

It has nothing to follow: a search reads the same state as the rest of the query. In the background, it has graphs built
for large namespaces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from contextlib import suppress

from bank_service.catalog.contract import Catalog, CatalogView, VectorSearch
from bank_service.catalog.nodes import leads
from bank_service.errors import UnavailableError
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.runtime.background import cancelled
from bank_service.runtime.threads import ended_in_thread, in_thread
from bank_service.search.nearest import Neighbours
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray
from bank_service.wire.tracing import span

BUILD_SECONDS = 10.0  # between two looks for namespaces that need a graph


class CatalogNearest:
    """Implements ``search.nearest.Nearest``."""

    def __init__(
        self,
        catalog: Catalog,
        vectors: VectorSearch,
        acknowledged: AcknowledgedSequence,
        pool: Executor,
        *,
        exact_below: int,
    ) -> None:
        """``vectors``: those of ``catalog``. A namespace of at most ``exact_below`` documents is searched exactly."""
        self._catalog = catalog
        self._vectors = vectors
        self._acknowledged = acknowledged
        self._pool = pool
        self._exact_below = exact_below
        self._sequence = 0  # known to be in the catalog
        self._task: asyncio.Task[None] | None = None

    @property
    def sequence(self) -> int:
        return max(self._sequence, self._acknowledged.value)

    async def start(self) -> None:
        self._sequence = await in_thread(self._pool, self._read_sequence)
        self._task = asyncio.create_task(self._build(), name="bank-graph-builder")

    async def stop(self) -> None:
        if self._task is not None:
            await asyncio.to_thread(self._vectors.stop)
            await cancelled(self._task)
            self._task = None

    async def reach(self, sequence: int) -> None:
        self._sequence = max(self._sequence, sequence)

    async def keep_up(self, sequence: int) -> None:
        pass

    def nearest(
        self,
        view: CatalogView,
        namespace: str,
        vector: FloatArray,
        depth: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
    ) -> Neighbours:
        with span("catalog.nearest", count=depth):
            keys = self._vectors.nearest(view, namespace, vector, depth, conditions, as_of)
        return Neighbours(keys, view.sequence())

    async def erase(self, namespaces: Collection[str]) -> None:
        """Does nothing: the catalog has removed the vectors together with their documents."""

    def _read_sequence(self) -> int:
        with self._catalog.view() as view:
            return view.sequence()

    async def _build(self) -> None:
        looked_at, num_lacking = -1, 0
        while True:
            if leads(self._catalog):
                with suppress(UnavailableError):
                    sequence = await in_thread(self._pool, self._read_sequence)  # other nodes write, too
                    if sequence != looked_at or num_lacking:
                        num_lacking = await ended_in_thread(self._pool, self._vectors.build_graphs, self._exact_below)
                        looked_at = sequence
            await asyncio.sleep(BUILD_SECONDS)
