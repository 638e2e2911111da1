"""A catalog and a vector store that follows it, for tests that have no event loop."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from bank_service.bank import Bank
from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import open_catalog
from bank_service.catalog.postgres import vector_search
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.search.catalog_nearest import CatalogNearest
from bank_service.search.nearest import Nearest
from bank_service.search.present import Present
from bank_service.search.ranking import closest, cosines_of
from bank_service.search.usearch import usearch_nearest
from bank_service.search.usearch.usearch_nearest import UsearchNearest
from bank_service.values.documents import Document, Gradient, PutResult, Query, StoredDocument
from bank_service.values.filters import Condition
from bank_service.wire.record import FloatArray
from tests.bank.catalog.test_catalog import IDENTITY
from tests.bank.postgres_server import schema_of
from tests.bank.search.exact_nearest import ExactNearest

DIMENSION = IDENTITY.embedding_dimension
# How a vector store finds a query's documents. "oracle" is the slow obvious store, the last two are PostgreSQL's ways,
# the others usearch's.
WAYS = ("oracle", "exact", "scan", "proposals", "all", "postgres", "postgres graph")
POSTGRES_WAYS = ("postgres", "postgres graph")
T = TypeVar("T")


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the bounds of usearch and PostgreSQL so that filtered queries go this way."""
    monkeypatch.setattr(usearch_nearest, "SCAN_SIZE", 0 if way in ("proposals", "all") else 10_000)
    monkeypatch.setattr(vector_search, "SCAN_SIZE", 0 if way == "postgres graph" else 10_000)
    monkeypatch.setattr(usearch_nearest, "MAX_PROPOSALS", 0 if way == "all" else 20_000)


def usearch_of(bank: Bank) -> UsearchNearest:
    assert isinstance(bank._nearest, UsearchNearest)
    return bank._nearest


def usearch(
    catalog: Catalog,
    folder: Path,
    pool: Executor,
    acknowledged: AcknowledgedSequence | None = None,
    *,
    exact_below: int = 0,
    snapshot_every: int = 10**6,
) -> UsearchNearest:
    return UsearchNearest(
        catalog,
        DIMENSION,
        folder,
        acknowledged or AcknowledgedSequence(),
        pool,
        exact_below=exact_below,
        snapshot_every=snapshot_every,
    )


class Collection:
    """A catalog and its vector store in one folder. Every change is in the vector store when its call returns."""

    def __init__(
        self, folder: Path, way: str = "exact", *, history_seconds: int = 0, exact_below: int | None = None
    ) -> None:
        self._folder = folder
        self._way = way
        self._history_seconds = history_seconds
        self._exact_below = (10_000 if way == "exact" else 0) if exact_below is None else exact_below
        self.open()

    def open(self) -> None:
        url = schema_of(self._folder) if self._way in POSTGRES_WAYS else None
        self.catalog = open_catalog(self._folder, IDENTITY, history_seconds=self._history_seconds, url=url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._pool = ThreadPoolExecutor(2)
        self.nearest = self._vector_store()
        self.run(self.nearest.start())

    def _vector_store(self) -> Nearest:
        if self._way == "oracle":
            return ExactNearest(self.catalog)
        if self.catalog.vectors is not None:
            acknowledged = AcknowledgedSequence()
            return CatalogNearest(self.catalog, self.catalog.vectors, acknowledged, self._pool, exact_below=10**6)
        return usearch(self.catalog, self._index, self._pool, exact_below=self._exact_below)

    def _reach(self, sequence: int) -> None:
        if self._way == "postgres graph":
            assert self.catalog.vectors is not None
            self.catalog.vectors.build_graphs(0)
        self.run(self.nearest.reach(sequence))

    def close(self) -> None:
        self.run(self.nearest.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._pool.shutdown()
        self.catalog.close()

    def lose_derived_data(self) -> None:
        """Deletes the vector store's files. Call it while the collection is closed."""
        shutil.rmtree(self._index, ignore_errors=True)

    @property
    def _index(self) -> Path:
        return self._folder / "index"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def put(
        self, id: str, vector: np.ndarray, metadata: Mapping[str, str] | None = None, namespace: str = "n"
    ) -> StoredDocument:
        stored = self._submit(id, vector, metadata or {}, namespace).result().stored
        self._reach(stored.sequence)
        return stored

    def fill(self, vectors: Mapping[str, np.ndarray], metadata: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Puts many documents, in order. Metadata by id."""
        futures = [self._submit(id, vector, (metadata or {}).get(id, {}), "n") for id, vector in vectors.items()]
        self._reach(max(future.result().stored.sequence for future in futures))

    def _submit(self, id: str, vector: np.ndarray, metadata: Mapping[str, str], namespace: str) -> Future[PutResult]:
        content = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
        document = Document(namespace, id, "", content.hex(), dict(metadata))
        return self.catalog.put(document, Gradient("0" * 64, 1, 1, False, content), None)

    def delete(self, id: str, namespace: str = "n", *, purge: bool = False) -> int:
        """Deletes a document. Returns the sequence of the change."""
        sequence = self.catalog.delete(namespace, id, None, purge=purge).result().sequence
        self.run(self.nearest.reach(sequence))
        return sequence

    def ids(
        self,
        vector: FloatArray,
        count: int,
        conditions: Sequence[Condition] = (),
        as_of: int | None = None,
        namespace: str = "n",
    ) -> list[str]:
        """The ids of the nearest ``count`` documents that the store finds, in order."""
        with self.catalog.view() as view:
            found = self.nearest.nearest(view, namespace, vector, 2 * count + 16, conditions, as_of)
            candidates = closest(view, found.keys, vector, count)
            cosines = cosines_of(candidates, vector)
            assert not found.is_ahead and found.sequence == view.sequence(), "nobody else writes"
        return [candidates[key].id for key in sorted(candidates, key=lambda key: (-cosines[key], candidates[key].id))]

    def answer(self, query: Query, vector: FloatArray) -> list[str]:
        """The answer of ``Present``, as ids."""
        with self.catalog.view() as view:
            found = Present(self.nearest, self.catalog.words).find(view, query, vector)
            assert not found.is_stale, "nobody else writes"
            return [hit.id for hit in view.hits(found.scores, include_text=False)]
