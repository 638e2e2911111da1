"""A purge leaves no bytes in any file under the bank's folder, within the time that is promised."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bank_service.bank import Bank
from bank_service.blobs.blob_store import Sweep
from bank_service.catalog.sqlite.catalog import SqliteCatalog
from bank_service.errors import NotFoundError, UnavailableError, VersionConflictError
from bank_service.search.usearch.usearch_index import UsearchIndex
from bank_service.upkeep import eraser
from bank_service.values.documents import Document, Gradient, Query
from tests.bank import inside
from tests.bank.catalog.test_history import SECRET, blobs, put
from tests.bank.search.collection import usearch_of
from tests.bank.search.test_as_of import open_bank

BOUND_SECONDS = 20.0  # for a bank of a few documents; a few of its own, and what other work takes on a test's machine
INDEX = ".usearch"


def traces(folder: Path, embedding: bytes, *digests: str) -> set[str]:
    """The files that have the secret, a document's vector as catalog or index has it, or a gradient's digest; INDEX for
    any of the index."""
    half = np.frombuffer(embedding, "<f4").astype("<f2").tobytes()
    found = set()
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if any(trace in content for trace in (SECRET.encode(), embedding, half, *map(str.encode, digests))):
                found.add(INDEX if path.suffix == INDEX else path.name)
    return found


async def within_the_bound(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        while not holds():
            await asyncio.sleep(0.1)


def num_erasures(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM pending_erasures").fetchone()[0])


async def embedding_of(bank: Bank, id: str) -> bytes:
    return (await bank.get("", id)).gradient.embedding


async def filled(bank: Bank) -> bytes:
    """Some documents, and one with the secret; that one's embedding."""
    for number in range(5):
        await put(bank, f"d{number}", f"text number {number}")
    await put(bank, "a", f"the {SECRET} " * 500)  # more than a page, so that it has some of its own
    await put(bank, "a", f"the {SECRET} again")
    await usearch_of(bank).follower.save()
    return await embedding_of(bank, "a")


@pytest.mark.asyncio
async def test_after_a_purge_text_and_vector_are_in_no_file(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        assert traces(data_dir, embedding) >= {"catalog.sqlite-wal", INDEX}
        digests = blobs(data_dir)
        await bank.delete("", "a", purge=True)
        digests -= blobs(data_dir)
        await within_the_bound(lambda: not traces(data_dir, embedding))
        await within_the_bound(lambda: not num_erasures(data_dir))
        assert len(digests) == 2
        await within_the_bound(lambda: not traces(data_dir, embedding, *digests))
        assert len(blobs(data_dir)) == 5
        assert (await bank.delete("", "a", purge=True)).version, "again is no error"
        with pytest.raises(NotFoundError):
            await bank.delete("", "never", purge=True)


@pytest.mark.asyncio
async def test_a_document_that_was_deleted_where_no_past_is_kept_leaves_every_file_when_it_is_purged(
    data_dir: Path,
) -> None:
    async with open_bank(data_dir, history_seconds=0) as bank:
        embedding = await filled(bank)
        await bank.delete("", "a")
        assert "catalog.sqlite-wal" in traces(data_dir, embedding), "else this test shows nothing"
        await bank.delete("", "a", purge=True)
        await within_the_bound(lambda: not traces(data_dir, embedding))


@pytest.mark.asyncio
async def test_a_bank_that_stops_erases_first(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eraser, "ERASE_SECONDS", 3600)
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        await bank.delete("", "a", purge=True)
    assert not traces(data_dir, embedding)


@pytest.mark.asyncio
async def test_what_a_crash_leaves_of_a_purge_the_next_start_erases(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = tmp_path / "crashed"
    with monkeypatch.context() as patch:
        patch.setattr(eraser, "ERASE_SECONDS", 3600)
        async with open_bank(data_dir) as bank:
            embedding = await filled(bank)
            await bank.delete("", "a", purge=True)
            shutil.copytree(data_dir, crashed, ignore=shutil.ignore_patterns("redis", "lock"))  # as a kill leaves it
    assert traces(crashed, embedding) >= {"catalog.sqlite-wal", INDEX}
    async with open_bank(crashed):
        await within_the_bound(lambda: not traces(crashed, embedding))


@pytest.mark.asyncio
async def test_a_reader_at_an_older_state_holds_up_the_erasing_and_no_write(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        with closing(sqlite3.connect(data_dir / "catalog.sqlite")) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM versions").fetchone()
            await bank.delete("", "a", purge=True)
            await within_the_bound(lambda: INDEX not in traces(data_dir, embedding))
            assert not await inside.upkeep(bank).eraser.erase() and traces(data_dir, embedding)
            async with asyncio.timeout(10):  # less than SQLite would wait for a reader
                await put(bank, "b", "written meanwhile")
        await within_the_bound(lambda: not traces(data_dir, embedding))


@pytest.mark.asyncio
async def test_a_rebuild_under_way_does_not_bring_a_purged_vector_back(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        # The rebuild stands between its copy of the catalog's state and its taking the old graph's place.
        advance = usearch_of(bank).compactor._advance

        def slowly(fresh: UsearchIndex, namespace: str, after: int) -> tuple[int, int]:
            advanced = advance(fresh, namespace, after)
            if not reached.is_set():
                loop.call_soon_threadsafe(reached.set)
                asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result(30)
            return advanced

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(usearch_of(bank).compactor, "_advance", slowly)
        rebuild = asyncio.create_task(usearch_of(bank).compactor.compact("default"))
        await reached.wait()
        await bank.delete("", "a", purge=True)
        await asyncio.sleep(3 * eraser.ERASE_SECONDS)
        may_go_on.set()
        await rebuild
        await within_the_bound(lambda: not num_erasures(data_dir))
        await usearch_of(bank).follower.save()
        assert not traces(data_dir, embedding)


@pytest.mark.asyncio
async def test_a_purge_rebuilds_the_index_of_its_namespace_and_of_no_other(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        await bank.put(Document("other", "gone", "", "a text"))
        await bank.delete("other", "gone")
        await bank.delete("", "d0")
        deletion = await bank.delete("", "a", purge=True)
        await bank._nearest.reach(deletion.sequence)
        await within_the_bound(lambda: not num_erasures(data_dir))
        assert not traces(data_dir, embedding)
        assert usearch_of(bank).compactor.num_compacted == 1
        assert usearch_of(bank).index.wasteful(0.0, 1) == ["other"]
        found = await bank.query(Query("", "text number 4", top_k=64))
        assert {hit.id for hit in found.hits} == {"d1", "d2", "d3", "d4"}


# Disks and blobs


def unremovable(path: Path) -> None:
    """A folder takes the file's place: unlinking it fails as on a disk that does not let it."""
    path.unlink()
    path.mkdir()


def removable(path: Path) -> None:
    path.rmdir()
    path.write_bytes(b"of no use, but there")


@pytest.mark.asyncio
async def test_a_purge_that_could_not_remove_a_gradient_says_so_and_its_repeat_finishes_it(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        path = inside.stores(bank).blobs.path((await bank.get("", "a")).gradient.digest)
        unremovable(path)
        for expected_version in (2, 2, 0, None):
            with pytest.raises(UnavailableError, match="purge it again"):
                await bank.delete("", "a", expected_version, purge=True)
        await within_the_bound(lambda: not traces(data_dir, embedding))
        with pytest.raises(VersionConflictError):
            await bank.delete("", "a", 1, purge=True)
        with pytest.raises(NotFoundError):
            await bank.get("", "a")
    async with open_bank(data_dir) as bank:  # a restart forgets neither
        with pytest.raises(UnavailableError, match="purge it again"):
            await bank.delete("", "a", purge=True)
        removable(path)
        await within_the_bound(lambda: not path.exists())  # by itself
        assert (await bank.delete("", "a", 2, purge=True)).version == 2
        await within_the_bound(lambda: not num_erasures(data_dir))
        assert (await bank.delete("", "a", purge=True)).version == 2


@pytest.mark.asyncio
async def test_a_gradient_that_could_not_be_removed_is_removed_later(data_dir: Path) -> None:
    async with open_bank(data_dir, history_seconds=0) as bank:
        await put(bank, "a", "a text")
        path = inside.stores(bank).blobs.path((await bank.get("", "a")).gradient.digest)
        unremovable(path)
        await bank.delete("", "a")
        await inside.background(bank).drain()
        assert path.is_dir()
        removable(path)
        await within_the_bound(lambda: not path.exists())


@pytest.mark.asyncio
async def test_a_write_keeps_its_gradient_from_a_sweep_before_the_catalog_names_it(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_bank(data_dir) as bank:
        sweeps: list[Sweep] = []
        commit = SqliteCatalog.put

        def swept_first(catalog: SqliteCatalog, document: Document, gradient: Gradient, *rest: Any) -> object:
            # The blob is written, the catalog does not name it yet.
            assert gradient.digest in blobs(data_dir)
            sweeps.append(inside.stores(bank).blobs.sweep(inside.discarder(bank).references))
            return commit(catalog, document, gradient, *rest)

        monkeypatch.setattr(SqliteCatalog, "put", swept_first)
        await put(bank, "a", "a text")
        assert len(sweeps) == 1 and sweeps[0].num_removed == 0
        assert len(blobs(data_dir)) == 1


@pytest.mark.asyncio
async def test_the_event_loop_waits_for_no_sweep(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        await put(bank, "a", "a text")
        digest = (await bank.get("", "a")).gradient.digest
        await bank.delete("", "a", purge=True)
        reached, may_go_on = threading.Event(), threading.Event()

        def slowly(digests: list[str]) -> set[str]:
            reached.set()
            assert may_go_on.wait(30)
            return inside.discarder(bank).references(digests)

        sweeping = asyncio.create_task(asyncio.to_thread(inside.stores(bank).blobs.sweep, slowly, [digest]))
        assert await asyncio.to_thread(reached.wait, 30)
        threading.Timer(10, may_go_on.set).start()  # so that a loop that waits fails the test, and does not hang
        async with asyncio.timeout(9):
            await put(bank, "a", "a text")
        assert not may_go_on.is_set(), "the write waited for the sweep"
        may_go_on.set()
        assert (await sweeping).num_removed == 0 and blobs(data_dir) == {digest}
