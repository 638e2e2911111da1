"""Two whole banks with one catalog and one object store, over gRPC."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bank_service.blobs.blob_store import name_of
from bank_service.blobs.objects import Objects
from bank_service.blobs.place import PROBE, check_gradients
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.catalog.factory import stored_collection
from bank_service.errors import (
    BankInUseError,
    CollectionMismatchError,
    NotFoundError,
    QuotaExceededError,
    UnavailableError,
    VersionConflictError,
)
from bank_service.records import discarder
from bank_service.service.preflight import check_startable
from bank_service.testing.client import Client, own_errors
from bank_service.values.config import BankConfig
from bank_service.wire.channel import SERVICE
from bank_service.wire.generated import bank_pb2 as pb
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.records.test_fetch import ingested, whole
from tests.bank.test_object_store import bank, gone

GRACE_SECONDS = 2


@pytest.fixture
def catalog(own_server: PostgresServer) -> str:
    return own_server.new_schema()


@pytest.fixture
def objects(objects_url: str) -> Objects:
    return RemoteObjects.at(objects_url)


@pytest_asyncio.fixture
async def clients(tmp_path: Path, catalog: str, objects_url: str) -> AsyncIterator[tuple[Client, Client]]:
    """A client of each node. The first node does the upkeep."""
    settings = {"catalog": catalog, "objects_grace_seconds": GRACE_SECONDS, "max_namespace_documents": 100}
    async with (
        bank(tmp_path / "first", objects_url, **settings) as first,
        bank(tmp_path / "second", objects_url, **settings) as second,
    ):
        yield first, second


@pytest.mark.asyncio
async def test_a_bank_without_documents_keeps_its_store_too(tmp_path: Path, catalog: str, objects_url: str) -> None:
    async def refused(name: str, objects: str | None) -> None:
        with pytest.raises(CollectionMismatchError, match="gradients must lie in .*, which has none"):
            async with bank(tmp_path / name, objects, catalog=catalog):
                pass

    RemoteObjects.at(objects_url).put(f"{PROBE}1", b"of a check that was killed")
    async with bank(tmp_path / "first", objects_url, catalog=catalog):
        await refused("beside", f"{objects_url}-other")
    await refused("alone", f"{objects_url}-other")
    await refused("folder", None)
    for objects, is_refused in ((f"{objects_url}-other", True), (objects_url, False)):
        config = BankConfig(data_dir=tmp_path / "checked", objects=objects, catalog=catalog)
        with pytest.raises(CollectionMismatchError, match="which has none") if is_refused else nullcontext():
            check_gradients(config, stored_collection(config.data_dir, catalog))
    async with bank(tmp_path / "third", objects_url, catalog=catalog):
        pass
    assert not list(RemoteObjects.at(f"{objects_url}-other").list())


async def listed(client: Client, namespace: str = "") -> dict[str, int]:
    return {each.id: each.version for each in (await client.list(namespace=namespace, page_size=1000)).documents}


@pytest.mark.asyncio
async def test_what_one_node_has_acknowledged_the_other_finds(clients: tuple[Client, Client]) -> None:
    for number in range(20):
        writer, reader = clients[number % 2], clients[1 - number % 2]
        put = await writer.put("a", f"the owl number {number}", namespace="new")
        (hit,) = (await reader.query(text=f"number {number}", namespace="new", top_k=1, include_text=True)).hits
        assert (hit.version, hit.text) == (put.version, f"the owl number {number}")
        await whole(reader, [hit.gradient_digest])
        stats = await reader.stats()
        assert stats.sequence == stats.indexed_sequence == put.sequence
    await clients[0].delete("a", namespace="new")
    with pytest.raises(NotFoundError):
        await clients[1].get("a", namespace="new")
    assert not (await clients[1].query(text="owl", namespace="new", top_k=1)).hits


@pytest.mark.asyncio
async def test_two_nodes_update_and_delete_the_same_documents(clients: tuple[Client, Client], objects: Objects) -> None:
    """Few contents, so that one node often stores the gradient that the other removes."""
    acknowledged: list[int] = []

    async def work(client: Client, seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(40):
            id = f"d{generator.randrange(5)}"
            try:
                if generator.random() < 0.3:
                    purge = generator.random() < 0.5
                    deleted = await client.delete(id, purge=purge)
                    if not purge:  # of a deleted document, a purge is no change
                        acknowledged.append(deleted.sequence)
                else:
                    answer = await client.put(id, f"the owl number {generator.randrange(4)}")
                    if answer.outcome != pb.IngestDocumentsResponse.UNCHANGED:
                        acknowledged.append(answer.sequence)
            except (NotFoundError, UnavailableError):
                pass

    await asyncio.gather(*(work(clients[seed % 2], seed) for seed in range(6)))
    assert len(set(acknowledged)) == len(acknowledged), "each change has a sequence of its own"
    documents = (await clients[0].list(page_size=1000)).documents
    assert len(acknowledged) > 50 and documents, "else this test shows nothing"
    assert await listed(clients[0]) == await listed(clients[1])
    await asyncio.sleep(GRACE_SECONDS + 3)
    stored = set(objects.list())
    assert {name_of(document.gradient_digest) for document in documents} <= stored
    for client in clients:
        await whole(client, [document.gradient_digest for document in documents])
        hits = (await client.query(text="owl", top_k=64, include_gradients=True)).hits
        assert {hit.id for hit in hits} == {document.id for document in documents}


@pytest.mark.asyncio
async def test_a_namespace_that_both_begin_at_once_is_one(clients: tuple[Client, Client]) -> None:
    for number in range(5):
        await asyncio.gather(*(clients[n % 2].put(f"d{n}", f"text {n}", namespace=f"space-{number}") for n in range(6)))
        for client in clients:
            assert len(await listed(client, f"space-{number}")) == 6
            assert len((await client.query(text="text", namespace=f"space-{number}", top_k=9)).hits) == 6


@pytest.mark.asyncio
async def test_limits_of_a_namespace_and_expected_versions_hold_over_both(clients: tuple[Client, Client]) -> None:
    async def put(number: int) -> bool:
        try:
            await clients[number % 2].put(f"d{number}", f"text {number}", namespace="full")
        except QuotaExceededError:
            return False
        return True

    assert sum(await asyncio.gather(*map(put, range(120)))) == 100
    await clients[0].put("one", "text")
    outcomes = await asyncio.gather(
        *(client.put("one", f"text {n}", expected_version=1) for n, client in enumerate(clients)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes].count(VersionConflictError) == 1


@pytest.mark.asyncio
async def test_a_purge_by_one_node_removes_what_the_other_has_dropped(
    clients: tuple[Client, Client], objects: Objects
) -> None:
    first, second = clients
    digests = await ingested(first, 3)
    await first.delete("d0")
    await second.delete("d1")
    await second.put("again", "text number 1")
    assert {name_of(digest) for digest in digests} <= set(objects.list())
    await second.delete("d0", purge=True)
    assert name_of(digests[0]) not in set(objects.list())
    await whole(first, digests[1:])


@pytest.mark.asyncio
async def test_a_purge_waits_for_a_removal_by_another_node(
    clients: tuple[Client, Client], catalog: str, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = await ingested(clients[0], 2)
    async with await psycopg.AsyncConnection.connect(catalog, autocommit=True) as connection:
        for digest in digests:  # as a node does whose object store is slow
            await connection.execute("INSERT INTO removals VALUES (%s, now() + interval '1 hour')", (digest,))
        purge = asyncio.create_task(clients[1].delete("d0", purge=True))
        await asyncio.sleep(4)
        assert not purge.done() and name_of(digests[0]) in set(objects.list())
        await connection.execute("DELETE FROM removals WHERE digest = %s", (digests[0],))
        await purge
        assert name_of(digests[0]) not in set(objects.list())
        monkeypatch.setattr(discarder, "BUSY_SECONDS", 0.5)
        refusal = await clients[1].refused(clients[1].delete("d1", purge=True), UnavailableError)
        assert "in use by other nodes" in refusal.message and "disk" not in refusal.message


@pytest.mark.asyncio
async def test_upkeep_goes_on_with_the_node_that_is_left(
    tmp_path: Path, catalog: str, objects: Objects, objects_url: str
) -> None:
    settings = {"catalog": catalog, "objects_grace_seconds": GRACE_SECONDS, "history_seconds": 1}
    async with bank(tmp_path / "second", objects_url, **settings) as second:
        pass
    async with bank(tmp_path / "first", objects_url, **settings) as first:
        async with bank(tmp_path / "second", objects_url, **settings) as second:
            digests = await ingested(first, 4)
            await first.delete("d0")
            assert await gone(objects, digests[0]) > GRACE_SECONDS - 1, "the first one does the upkeep"
            await second.delete("d1")
            await gone(objects, digests[1])
        await first.delete("d2")
        await gone(objects, digests[2])
        objects.put(name_of("0" * 64), b"of a write that a crash cut short")
    async with bank(tmp_path / "second", objects_url, **settings) as second:
        await gone(objects, "0" * 64)
        await whole(second, digests[3:])


@pytest.mark.asyncio
async def test_writes_go_on_after_a_node_has_lost_its_connections(
    clients: tuple[Client, Client], catalog: str, objects: Objects
) -> None:
    acknowledged: dict[str, tuple[int, str]] = {}  # name → version and digest
    stop = asyncio.Event()

    async def write(client: Client, name: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                put = await client.put(f"{name}-{number % 5}", f"{name} says {number}", namespace=name)
                acknowledged[f"{name}/{put.id}"] = put.version, put.gradient_digest
            except UnavailableError:
                await asyncio.sleep(0.01)

    writers = [asyncio.create_task(write(clients[n % 2], f"writer{n}")) for n in range(4)]
    for _ in range(4):
        await asyncio.sleep(0.7)
        with psycopg.connect(catalog, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM (SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory') "
                "AS found WHERE random() < 0.5"
            )
    num_before = len(acknowledged)
    await asyncio.sleep(1)
    stop.set()
    await asyncio.gather(*writers)
    assert num_before >= 4, "else this test shows nothing"
    for name in (f"writer{n}" for n in range(4)):
        documents = (await clients[0].list(namespace=name, page_size=100)).documents
        stored = {f"{name}/{each.id}": (each.version, each.gradient_digest) for each in documents}
        assert stored.keys() == {each for each in acknowledged if each.startswith(name)}
        for each, (version, digest) in stored.items():  # a newer one had no answer
            assert version > acknowledged[each][0] or (version, digest) == acknowledged[each]
        await whole(clients[1], [each.gradient_digest for each in documents])


@pytest.mark.asyncio
async def test_a_change_that_the_other_node_would_miss_is_refused(
    clients: tuple[Client, Client], tmp_path: Path, catalog: str, objects_url: str
) -> None:
    first, _ = clients
    await ingested(first, 3)
    (tmp_path / "learner").mkdir()
    for call in (
        first.stub.RecodeCollection(pb.RecodeCollectionRequest(codec="factors-2-1-8")),
        first.stub.UpgradeLearner(
            pb.UpgradeLearnerRequest(action=pb.UpgradeLearnerRequest.BEGIN, learner=str(tmp_path / "learner"))
        ),
    ):
        with pytest.raises(UnavailableError, match="only be changed by a node that is alone"):
            async with own_errors():
                async for _ in call:
                    pass
    with pytest.raises(BankInUseError, match="only where the gradients of all lie in one object store"):
        check_startable(BankConfig(data_dir=tmp_path / "third", catalog=catalog))
    check_startable(BankConfig(data_dir=tmp_path / "third", catalog=catalog, objects=objects_url))


@pytest.mark.asyncio
async def test_a_node_that_missed_a_change_says_so_and_does_not_serve(
    clients: tuple[Client, Client], catalog: str
) -> None:
    first, _ = clients
    health = health_pb2_grpc.HealthStub(first.channel)

    async def state() -> int:
        return int((await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status)

    assert await state() == health_pb2.HealthCheckResponse.SERVING
    with psycopg.connect(catalog, autocommit=True) as connection:
        connection.execute("UPDATE collection SET codec = 'factors-2-1-8'")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    while await state() == health_pb2.HealthCheckResponse.SERVING:  # the test's own limit ends it
        await asyncio.sleep(0.1)
    for call in (first.put("a", "an owl"), first.query(text="an owl", top_k=1)):
        assert "start this node again" in (await first.refused(call, UnavailableError)).message
