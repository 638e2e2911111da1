"""An index frees the nodes of removed vectors, while others search and change it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from bank_service.catalog.factory import open_catalog
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.search.queries import Queries
from bank_service.search.usearch import compaction
from bank_service.search.usearch.graph import new_index
from bank_service.search.usearch.usearch_index import MANIFEST, UsearchIndex
from bank_service.values.documents import Document, Gradient, Query
from tests.bank.catalog.test_catalog import IDENTITY, gradient
from tests.bank.search.collection import usearch

NUM_DOCUMENTS = 300


class Parts:
    """A catalog and its vector store as a bank has them, with changes that wait for the store."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.catalog = open_catalog(folder, IDENTITY)
        self.acknowledged = AcknowledgedSequence()
        self.nearest = usearch(self.catalog, folder / "index", pool, self.acknowledged)
        self.index, self.compactor = self.nearest.index, self.nearest.compactor
        self.queries = Queries(self.catalog, self.nearest, self.acknowledged, pool, pool, 1)
        self._generator = np.random.default_rng(0)

    async def put(self, *ids: str) -> None:
        futures = []
        for id in ids:
            vector = self._generator.standard_normal(IDENTITY.embedding_dimension)
            gradient = Gradient("0" * 64, 1, 1, False, (vector / np.linalg.norm(vector)).astype("<f4").tobytes())
            futures.append(self.catalog.put(Document("n", id, "", id), gradient, None))
        await self._reach([(await asyncio.wrap_future(future)).stored.sequence for future in futures])

    async def delete(self, *ids: str) -> None:
        futures = [self.catalog.delete("n", id, None) for id in ids]
        await self._reach([(await asyncio.wrap_future(future)).sequence for future in futures])

    async def _reach(self, sequences: list[int]) -> None:
        self.acknowledged.advance(max(sequences))
        await self.nearest.reach(max(sequences))

    async def ids(self, top_k: int = 64) -> set[str]:
        vector = np.asarray([[1, 0, 0, 0]], np.float32)
        found = await self.queries.search(Query("n", vector=(1.0,), top_k=top_k), vector)
        return {hit.id for hit in found.hits}


@asynccontextmanager
async def parts_in(folder: Path, pool: ThreadPoolExecutor) -> AsyncIterator[Parts]:
    parts = Parts(folder, pool)
    await parts.nearest.start()
    try:
        yield parts
    finally:
        await parts.nearest.stop()
        parts.catalog.close()


def names(numbers: range) -> list[str]:
    return [f"doc {number}" for number in numbers]


@pytest.mark.asyncio
async def test_a_namespace_is_wasteful_from_the_share_and_the_number_on(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    async with parts_in(tmp_path, pool) as parts:
        await parts.put(*names(range(100)))
        await parts.delete(*names(range(30)))
        assert parts.index.wasteful(0.3, 1) == []
        await parts.delete("doc 30")
        assert parts.index.wasteful(0.3, 31) == ["n"]
        assert parts.index.wasteful(0.3, 32) == []
        parts.index.save(tmp_path / "saved", "c", 1)
        loaded = UsearchIndex(IDENTITY.embedding_dimension)
        assert loaded.load(tmp_path / "saved", "c") == 1
        assert loaded.wasteful(0.3, 31) == ["n"], "a restart must not forget what is dead"
        await parts.compactor.compact("n")
        assert parts.index.wasteful(0.0, 1) == [] and parts.index.size("n") == 69
        assert await parts.ids() <= set(names(range(31, 100)))


def become_old(folder: Path) -> None:
    """Makes a snapshot one of a version whose graphs have all vectors."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for space, (name, _) in manifest["files"].items():
        graph = new_index(IDENTITY.embedding_dimension)
        graph.load(str(folder / name))
        content = (folder / name).read_bytes()[: graph.serialized_length]
        (folder / name).write_bytes(content)
        manifest["files"][space] = (name, hashlib.sha256(content).hexdigest())
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.asyncio
async def test_a_graph_of_an_older_version_answers_and_is_built_anew(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parts_in(tmp_path, pool) as parts:
        await parts.put(*names(range(40)))
    become_old(tmp_path / "index")
    async with parts_in(tmp_path, pool) as parts:
        assert parts.index.wasteful(1.0, 10**6) == ["n"], "it must not be taken for a graph of this version"
        assert await parts.ids() == set(names(range(40)))
        await parts.put("doc 40")
    monkeypatch.setattr(compaction, "CHECK_SECONDS", 0.01)
    async with parts_in(tmp_path, pool) as parts, asyncio.timeout(60):
        while parts.index.wasteful(1.0, 10**6):
            await asyncio.sleep(0.01)
        assert parts.index.size("n") == 41
        assert await parts.ids() == set(names(range(41)))
    loaded = UsearchIndex(IDENTITY.embedding_dimension)
    assert loaded.load(tmp_path / "index", parts.catalog.collection_id) == 41
    assert loaded.wasteful(1.0, 10**6) == []


@pytest.mark.asyncio
async def test_a_rebuild_ends_though_every_look_finds_new_changes(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parts_in(tmp_path, pool) as parts:
        await parts.put(*names(range(10)))
        advance, numbers = parts.compactor._advance, itertools.count(10)

        def behind(fresh: UsearchIndex, namespace: str, after: int) -> tuple[int, int]:
            advanced = advance(fresh, namespace, after)
            stored = Document("n", f"doc {next(numbers)}", "", "text")
            parts.catalog.put(stored, gradient(), None).result()
            return advanced

        monkeypatch.setattr(parts.compactor, "_advance", behind)
        async with asyncio.timeout(10):
            await parts.compactor.compact("n")
        assert parts.index.size("n") >= 10


@pytest.mark.asyncio
async def test_queries_and_changes_go_on_while_the_index_is_compacted(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "MIN_DEAD", 20)
    monkeypatch.setattr(compaction, "DEAD_SHARE", 0.1)
    monkeypatch.setattr(compaction, "CHECK_SECONDS", 0.01)
    async with parts_in(tmp_path, pool) as parts:
        await parts.put(*names(range(NUM_DOCUMENTS)))
        living = set(names(range(NUM_DOCUMENTS)))
        stop = asyncio.Event()

        async def search() -> int:
            count = 0
            while not stop.is_set():
                before = set(living)
                found = await parts.ids()
                # A document that was deleted before the query began is never found, and the answer is always full.
                assert len(found) == 64 and {id for id in found if id.startswith("doc")} <= before
                count += 1
            return count

        searching = asyncio.create_task(search())
        async with asyncio.timeout(60):
            for start in range(0, 200, 10):
                gone = names(range(start, start + 10))
                await parts.delete(*gone)
                living -= set(gone)
                if start % 50 == 0:
                    await parts.put(f"new {start}")
                    await parts.delete(f"new {start}")
                await asyncio.sleep(0)
            while parts.index.wasteful(0.1, 20):
                await asyncio.sleep(0.01)
        stop.set()
        assert await searching > 0 and parts.compactor.num_compacted >= 1
        await parts.compactor.stop()
        assert parts.index.size("n") == len(living) == 100
        keys, _ = parts.index.search("n", np.asarray([1, 0, 0, 0], np.float32), 1000)
        with parts.catalog.view() as view:
            assert {item.id for item in view.candidates(keys.tolist())} == living
