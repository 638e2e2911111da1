"""A bank whose gradients lie in an object store, in good and bad weather."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from bank_service.backup.restore import restore
from bank_service.backup.snapshot import snapshot_folder
from bank_service.blobs import remote_objects
from bank_service.blobs.blob_store import name_of
from bank_service.blobs.objects import Objects
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import CollectionMismatchError, DataLossError, UnavailableError
from bank_service.service.offline import opened
from bank_service.service.offline import scrub as scrub_folder
from bank_service.service.preflight import check_startable
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, upload_of
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.upkeep import scrub
from bank_service.values.config import BankConfig
from bank_service.wire.generated import bank_pb2 as pb
from tests.bank.postgres_server import schema_of
from tests.bank.records.test_fetch import ingested, whole
from tests.bank.weather import Weather

GRACE_SECONDS = 3


@asynccontextmanager
async def bank(data_dir: Path, objects: str | None = None, **settings: Any) -> AsyncIterator[Client]:
    config = BankConfig(data_dir=data_dir, objects=objects, **settings)
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        yield client


@pytest.fixture
def objects(objects_url: str) -> Objects:
    """The store behind the bank's back."""
    return RemoteObjects.at(objects_url)


async def forget(data_dir: Path) -> None:
    """Empties the bank's cache."""
    async with Redis.from_url(f"unix://{data_dir / 'redis' / 'redis.sock'}") as redis:
        await redis.flushall()


async def gone(objects: Objects, digest: str) -> float:
    """Returns when the store has the gradient no more, with the time that it took. The test's own limit ends it."""
    begun = time.monotonic()
    while name_of(digest) in set(objects.list()):
        await asyncio.sleep(0.05)
    return time.monotonic() - begun


@pytest.mark.asyncio
async def test_gradients_lie_in_the_store_and_the_folder_knows_which(
    data_dir: Path, objects: Objects, objects_url: str
) -> None:
    async with bank(data_dir, objects_url) as client:
        digests = await ingested(client)
        await whole(client, digests)
    assert not (data_dir / "blobs").exists()
    assert set(objects.list()) == {"bank.json", "sequence.json", *map(name_of, digests)}
    async with bank(data_dir) as client:
        await whole(client, digests)
        assert (await client.put("d0", "text number 0")).outcome == pb.IngestDocumentsResponse.UNCHANGED


@pytest.mark.asyncio
async def test_with_a_catalog_in_postgresql_the_folder_may_be_lost(tmp_path: Path, objects_url: str) -> None:
    catalog = schema_of(tmp_path)
    async with bank(tmp_path / "first", objects_url, catalog=catalog) as client:
        digests = await ingested(client)
    async with bank(tmp_path / "second", objects_url, catalog=catalog) as client:
        await whole(client, digests)
        await client.delete("d0")
    for wrong in (None, f"{objects_url}-wrong"):
        with pytest.raises(CollectionMismatchError, match="which has none; name their folder"):
            async with bank(tmp_path / "third", wrong, catalog=catalog):
                pass
    async with bank(tmp_path / "third", objects_url, catalog=catalog) as client:
        await whole(client, digests[1:])
        assert (await client.put("d1", "text number 1")).outcome == pb.IngestDocumentsResponse.UNCHANGED
    (tmp_path / "scrubbed").mkdir()
    RemoteObjects.at(objects_url).put(name_of(digests[1]), b"rotten")
    config = BankConfig(data_dir=tmp_path / "scrubbed", objects=objects_url)
    with pytest.raises(CollectionMismatchError, match="must have a bank, it has none; .* its catalog with --catalog"):
        await scrub_folder(config, HashEncoder(), HashEmbedder())
    config = BankConfig(data_dir=tmp_path / "scrubbed", catalog=catalog, objects=objects_url)
    counts = await scrub_folder(config, HashEncoder(), HashEmbedder())
    assert (counts.num_gradients, counts.num_repaired, counts.num_lost) == (len(digests) - 1, 1, 0)
    with pytest.raises(CollectionMismatchError, match="it belongs to collection"):
        async with bank(tmp_path / "fourth", objects_url, catalog=schema_of(tmp_path / "another")):
            pass


@pytest.mark.asyncio
async def test_a_store_that_lost_everything_is_refused_until_the_operator_says_so(
    data_dir: Path, objects: Objects, objects_url: str
) -> None:
    async with bank(data_dir, objects_url) as client:
        digests = await ingested(client, 3)
    for name in list(objects.list()):
        objects.remove(name)
    with pytest.raises(CollectionMismatchError, match="which has none; .*If they are lost, store") as caught:
        async with bank(data_dir):
            pass
    (content,) = re.findall(r"store (\{.*\}) there as bank.json", str(caught.value))
    objects.put("bank.json", content.encode())
    async with bank(data_dir) as client:
        await whole(client, digests)


@pytest.mark.asyncio
async def test_an_unchanged_document_moves_no_gradient(data_dir: Path, weather: Weather, objects_url: str) -> None:
    async with bank(data_dir, objects_url) as client:
        await ingested(client, 3)
        weather.requests.clear()
        await ingested(client, 3)
        assert [method for method, _ in weather.requests] == ["HEAD"] * 3


@pytest.mark.asyncio
async def test_a_busy_store_costs_time_only(data_dir: Path, weather: Weather, objects_url: str) -> None:
    async with bank(data_dir, objects_url) as client:
        weather.num_refused = 8
        digests = await ingested(client)
        await forget(data_dir)
        weather.num_refused = 8
        await whole(client, digests)
        assert weather.num_refused == 0


@pytest.mark.asyncio
async def test_while_the_store_is_silent_reads_go_on_where_they_can_and_writes_fail_in_time(
    data_dir: Path,
    weather: Weather,
    objects_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote_objects, "REQUEST_SECONDS", 4.0)
    monkeypatch.setattr(remote_objects, "RETRY_SECONDS", 5.0)
    async with bank(data_dir, objects_url) as client:
        digests = await ingested(client, 4)
        await whole(client, digests[:2])
        await asyncio.sleep(0.5)  # the cache is filled after the answer
        weather.delay_seconds = 30.0
        begun = time.monotonic()
        waiting = [asyncio.create_task(client.refused(client.fetch([digests[2]]), UnavailableError)) for _ in range(20)]
        writing = asyncio.create_task(client.refused(client.put("new", "a new text"), UnavailableError))
        await asyncio.sleep(0.2)
        hits = (await client.query(text="text number 1", top_k=4)).hits
        assert len(hits) == 4
        await whole(client, digests[:2])
        assert not any(task.done() for task in (*waiting, writing)), "they don't wait for the store"
        for error in await asyncio.gather(*waiting, writing):
            assert "the object store must answer" in error.message
            assert "s3:" not in error.message and objects_url.rsplit("/", 1)[1] not in error.message
        assert f"the object store {objects_url} must answer" in caplog.text
        assert time.monotonic() - begun < 25
        await client.delete("d3")  # needs the catalog only
        weather.delay_seconds = 0.0
        assert (await client.put("new", "a new text")).outcome == pb.IngestDocumentsResponse.CREATED
        await whole(client, digests[:3])
        assert {entry.id for entry in (await client.list()).documents} == {"d0", "d1", "d2", "new"}


@pytest.mark.asyncio
async def test_a_store_that_refuses_the_bank_loses_nothing(
    data_dir: Path, weather: Weather, objects_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one whose credentials have expired."""
    async with bank(data_dir, objects_url, objects_grace_seconds=0) as client:
        digests = await ingested(client, 4)
        await forget(data_dir)
        weather.num_refused, weather.refusal = 1_000_000, (403, "ExpiredToken")
        for call in (client.fetch(digests[:1]), client.put("new", "a new text"), client.put("d0", "text number 0")):
            error = await client.refused(call, UnavailableError)
            assert "the object store must answer, got 403 Forbidden" in error.message
        assert len((await client.query(text="text number 1", top_k=4)).hits) == 4
        await client.delete("d3")
        weather.num_refused = 0
        await whole(client, digests[:3])
        # The refused text may wait for the end of its removal, which was refused, too.
        assert (await client.put("new", "another new text")).outcome == pb.IngestDocumentsResponse.CREATED
        assert (await client.put("d0", "text number 0")).outcome == pb.IngestDocumentsResponse.UNCHANGED
        assert (await client.stats()).num_documents == 4
    assert "is corrupt" not in caplog.text and "is missing" not in caplog.text


@pytest.mark.asyncio
async def test_a_scrub_waits_while_the_store_is_away(
    data_dir: Path, weather: Weather, objects_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bank(data_dir, objects_url) as client:
        await ingested(client, 3)
    monkeypatch.setattr(remote_objects, "MAX_RETRIES", 0)
    monkeypatch.setattr(scrub, "WAIT_SECONDS", 0.1)
    async with opened(BankConfig(data_dir=data_dir), HashEncoder(), HashEmbedder()) as stopped:
        await asyncio.sleep(0.5)  # the first sweep has ended
        weather.num_refused = 5
        counts = await stopped.scrub()
        assert (counts.num_gradients, counts.num_lost, counts.num_repaired, weather.num_refused) == (3, 0, 0, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("fault", ["missing", "rotten", "rotten, of the same size"])
async def test_a_damaged_gradient_is_made_again_and_never_given_and_an_uploaded_one_is_a_loss(
    data_dir: Path, objects: Objects, objects_url: str, fault: str
) -> None:
    async with bank(data_dir, objects_url) as client:
        digests = await ingested(client, 2)
        record = objects.read(name_of(digests[0]))
        (uploaded,) = await client.upload(*upload_of(pb.Document(id="mine", text="mine"), record))
        await client.delete("d0")
        for digest in (uploaded.gradient_digest, digests[1]):
            if fault == "missing":
                objects.remove(name_of(digest))
            else:
                objects.put(name_of(digest), b"rot" if fault == "rotten" else bytes(objects.size(name_of(digest))))
        await whole(client, digests[1:])
        error = await client.refused(client.fetch([uploaded.gradient_digest]), DataLossError)
        assert error.digest == uploaded.gradient_digest
        await client.upload(*upload_of(pb.Document(id="mine", text="mine"), record))
        await whole(client, [uploaded.gradient_digest])


@pytest.mark.asyncio
async def test_a_gradient_stays_for_the_grace_period_and_a_purged_one_does_not(
    data_dir: Path, objects: Objects, objects_url: str
) -> None:
    async with bank(data_dir, objects_url, objects_grace_seconds=GRACE_SECONDS) as client:
        deleted, kept, purged = await ingested(client, 3)
        await client.delete("d2", purge=True)
        assert name_of(purged) not in set(objects.list())
        for id in ("d0", "d1"):
            await client.delete(id)
        await client.put("again", "text number 1")
        assert await gone(objects, deleted) > GRACE_SECONDS - 1
        await whole(client, [kept])


@pytest.mark.asyncio
@pytest.mark.parametrize("starts_again", [False, True])
async def test_a_purge_removes_the_gradient_of_a_document_that_was_deleted_before(
    data_dir: Path, objects: Objects, objects_url: str, starts_again: bool
) -> None:
    async with bank(data_dir, objects_url) as client:
        first, kept = await ingested(client, 2)
        await client.delete("d0")
        assert name_of(first) in set(objects.list())
        if not starts_again:
            await client.delete("d0", purge=True)
    if starts_again:
        async with bank(data_dir) as client:
            await client.delete("d0", purge=True)
    assert {name for name in objects.list() if "/" in name} == {name_of(kept)}


@pytest.mark.asyncio
async def test_an_orphan_is_swept_after_the_grace_period_and_what_a_document_has_is_not(
    data_dir: Path, objects: Objects, objects_url: str
) -> None:
    orphan = "0" * 64
    async with bank(data_dir, objects_url) as client:
        digests = await ingested(client, 3)
    objects.put(name_of(orphan), b"of a write that a crash cut short")
    objects.put("ab/notes.txt", b"of somebody else")
    async with bank(data_dir, objects_grace_seconds=GRACE_SECONDS) as client:
        assert await gone(objects, orphan) > GRACE_SECONDS - 1
        await whole(client, digests)
    assert "ab/notes.txt" in set(objects.list())


@pytest.mark.asyncio
async def test_each_bank_has_a_store_of_its_own_and_keeps_it(data_dir: Path, tmp_path: Path, objects_url: str) -> None:
    own = f"{objects_url}/own"
    async with bank(data_dir, own) as client:
        await ingested(client, 1)
    other, in_folder = tmp_path / "other", tmp_path / "in-folder"
    with pytest.raises(CollectionMismatchError, match="it belongs to collection"):
        async with bank(other, own):
            pass
    async with bank(in_folder) as client:
        await ingested(client, 1)
    for folder, url in ((data_dir, f"{own}/below"), (in_folder, f"{objects_url}/new")):
        with pytest.raises(CollectionMismatchError, match="`regrad move` carries the bank"):
            check_startable(BankConfig(data_dir=folder, objects=url))
    with pytest.raises(CollectionMismatchError, match="must be empty for a new bank"):
        async with bank(tmp_path / "third", objects_url):
            pass


@pytest.mark.asyncio
async def test_a_bank_moves_to_an_object_store_by_a_snapshot_and_goes_on_after_an_interrupted_restore(
    data_dir: Path, tmp_path: Path, objects: Objects, objects_url: str
) -> None:
    async with bank(data_dir) as client:
        digests = await ingested(client, 100)
    target = f"{objects_url}-snapshot"
    assert list(snapshot_folder(data_dir, target))[-1].num_copied == 100
    steps = restore(target, tmp_path / "moved", objects_url)
    next(steps)
    steps.close()
    assert not (tmp_path / "moved").exists() and len(list(objects.list())) > 60
    assert list(restore(target, tmp_path / "moved", objects_url))[-1].manifest is not None
    async with bank(tmp_path / "moved") as client:
        await whole(client, digests[:50])
        await whole(client, digests[50:])
    with pytest.raises(CollectionMismatchError, match="must be empty"):
        list(restore(target, tmp_path / "second", objects_url))
    assert not (tmp_path / "second").exists()
    back = f"{tmp_path}/back"
    assert list(snapshot_folder(tmp_path / "moved", back))[-1].num_copied == 100
    assert list(restore(back, tmp_path / "home"))[-1].manifest is not None
    async with bank(tmp_path / "home") as client:
        await whole(client, digests[:50])
        await whole(client, digests[50:])
