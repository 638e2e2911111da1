"""Two banks on one store of gradients, and older states of a catalog beside newer gradients."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import psycopg
import pytest

from bank_service.blobs import claim
from bank_service.blobs.blob_store import name_of
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import CollectionMismatchError, UnavailableError
from bank_service.testing.client import Client
from tests.bank.postgres_server import schema_of, shared_server
from tests.bank.records.test_fetch import ingested, whole
from tests.bank.test_object_store import bank


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "KEEP_SECONDS", 0.2)


async def stopped(client: Client) -> None:
    """Returns when the bank removes no more gradients. The test's own limit ends it."""
    while not (await client.stats()).removals_stopped:
        await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_a_restored_dump_beside_the_nodes_of_its_database_stops_both_and_a_restart_goes_on(
    tmp_path: Path, objects_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, objects = shared_server(), RemoteObjects.at(objects_url)
    catalog = server.new_database()
    async with (
        bank(tmp_path / "first", objects_url, catalog=catalog, objects_grace_seconds=2) as first,
        bank(tmp_path / "second", objects_url, catalog=catalog, objects_grace_seconds=2) as second,
    ):
        digests = await ingested(first, 3)
        restored = server.dumped_and_restored(catalog)
        async with bank(tmp_path / "dump", objects_url, catalog=restored, objects_grace_seconds=2) as dump:
            for client in (first, second, dump):
                await stopped(client)
            new = (await first.put("new", "in one catalog only")).gradient_digest
            await dump.delete("d0")
            await second.delete("d1")
            async with bank(tmp_path / "third", objects_url, catalog=catalog, objects_grace_seconds=2) as third:
                assert (await third.stats()).removals_stopped, "it joins the nodes, and the dump still runs"
                await asyncio.sleep(3)
            assert {name_of(digest) for digest in (new, *digests)} <= set(objects.list())
            await second.refused(second.delete("d1", purge=True), UnavailableError)
    assert "another process has opened s3://" in caplog.text
    async with bank(tmp_path / "first", objects_url, catalog=catalog, objects_grace_seconds=2) as client:
        assert not (await client.stats()).removals_stopped
        await client.delete("d2", purge=True)
        assert not {name_of(digests[1]), name_of(digests[2])} & set(objects.list())
        await whole(client, [digests[0], new])


@pytest.mark.asyncio
async def test_of_two_catalogs_with_one_id_none_removes_gradients_of_the_other(
    data_dir: Path, tmp_path: Path, objects_url: str
) -> None:
    objects, copy = RemoteObjects.at(objects_url), tmp_path / "copy"
    async with bank(data_dir, objects_url) as client:
        await ingested(client, 2)
    shutil.copytree(data_dir, copy)
    async with bank(data_dir, objects_grace_seconds=2) as client, bank(copy, objects_grace_seconds=2) as other:
        new, dropped = (await client.put("new", "in one catalog only")).gradient_digest, await ingested(other, 1)
        await other.delete("d0")
        await stopped(client)
        await stopped(other)
        await asyncio.sleep(3)
        assert {name_of(digest) for digest in (new, *dropped)} <= set(objects.list())
        await client.refused(client.delete("new", purge=True), UnavailableError)
    async with bank(data_dir) as client:
        assert not (await client.stats()).removals_stopped
        await client.delete("d0", purge=True)
        assert name_of(dropped[0]) not in set(objects.list())


@pytest.mark.asyncio
async def test_a_bank_that_starts_again_beside_the_one_that_it_stopped_stops_again(
    data_dir: Path, tmp_path: Path, objects_url: str
) -> None:
    copy = tmp_path / "copy"
    async with bank(data_dir, objects_url) as client:
        await ingested(client, 1)
    shutil.copytree(data_dir, copy)
    async with bank(copy) as other:
        for _ in range(2):
            async with bank(data_dir) as client:
                await stopped(client)
                await stopped(other)
                await client.refused(client.delete("d0", purge=True), UnavailableError)


@pytest.mark.asyncio
async def test_an_older_copy_of_a_bank_does_not_start_on_the_store_of_the_running_one(
    data_dir: Path, tmp_path: Path, objects_url: str
) -> None:
    objects, copy = RemoteObjects.at(objects_url), tmp_path / "copy"
    async with bank(data_dir, objects_url) as client:
        await ingested(client, 2)
    shutil.copytree(data_dir, copy)
    async with bank(data_dir) as client:
        digests = await ingested(client, 4)
        while b": 4}" not in objects.read("sequence.json"):
            await asyncio.sleep(0.05)
        with pytest.raises(CollectionMismatchError, match="which has reached sequence 4, got 2: it is an older state"):
            async with bank(copy):
                pass
        await client.delete("d3", purge=True)
        assert name_of(digests[3]) not in set(objects.list())


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["sqlite", "postgresql"])
async def test_an_older_catalog_beside_the_gradients_of_today_is_refused_until_the_operator_says_so(
    data_dir: Path, tmp_path: Path, place: str
) -> None:
    catalog = None if place == "sqlite" else schema_of(tmp_path)
    async with bank(data_dir, catalog=catalog) as client:
        await ingested(client, 2)
    if catalog is None:
        shutil.copy(data_dir / "catalog.sqlite", tmp_path / "older")
    async with bank(data_dir, catalog=catalog) as client:
        digests = await ingested(client, 4)
    if catalog is None:
        assert not (data_dir / "catalog.sqlite-wal").exists()
        shutil.copy(tmp_path / "older", data_dir / "catalog.sqlite")
    else:
        with psycopg.connect(catalog) as connection:
            connection.execute("DELETE FROM versions WHERE began > 2")
            connection.execute("UPDATE collection SET sequence = 2")
    with pytest.raises(CollectionMismatchError, match=r"If the newer one is lost, remove sequence\.json there"):
        async with bank(data_dir, catalog=catalog):
            pass
    assert all((data_dir / "blobs" / name_of(digest)).exists() for digest in digests)
    (data_dir / "blobs" / "sequence.json").unlink()
    async with bank(data_dir, catalog=catalog) as client:
        await whole(client, digests[:2])
