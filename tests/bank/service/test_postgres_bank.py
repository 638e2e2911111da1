"""A whole bank with its catalog in PostgreSQL, over gRPC. Its gradients lie in its folder or in an object store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from bank_service.blobs.blob_store import name_of
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import InvalidArgumentError, NotFoundError, UnavailableError
from bank_service.service.offline import scrub
from bank_service.service.preflight import check_startable
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.wire.generated import bank_pb2 as pb
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.postgres_server import started

TEXTS = {f"d{number}": f"the owl number {number} sits in tree {number % 5}" for number in range(30)}


@pytest.fixture(params=["folder", "moto", pytest.param("seaweed", marks=pytest.mark.only_test_all)])
def config(request: pytest.FixtureRequest, data_dir: Path, own_server: PostgresServer) -> BankConfig:
    stores = {"moto": "objects_url", "seaweed": "seaweed_url"}
    objects = request.getfixturevalue(stores[request.param]) if request.param in stores else None
    return BankConfig(data_dir=data_dir, catalog=own_server.new_schema(), objects=objects, history_seconds=3600)


@pytest_asyncio.fixture
async def client(config: BankConfig) -> AsyncIterator[Client]:
    async with (
        BankServer(config, HashEncoder(), HashEmbedder()) as server,
        Client(server.address.target) as connected,
    ):
        yield connected


@pytest.mark.asyncio
async def test_documents_go_in_change_are_found_and_go(client: Client, config: BankConfig) -> None:
    answers = await client.ingest(
        *({"id": id, "text": text, "metadata": {"parity": str(len(id) % 2)}} for id, text in TEXTS.items())
    )
    assert sorted(answer.sequence for answer in answers) == list(range(1, 31))
    for id, text in list(TEXTS.items())[:5]:
        assert (await client.query(text=text, top_k=1)).hits[0].id == id, "by its vector"
        found = await client.query(text=f"number {id[1:]}", top_k=1, retrieval=pb.LEXICAL)
        assert found.hits[0].id == id, "by its words"
    even = pb.Filter.Condition(key="parity", operator=pb.Filter.Condition.EQUALS, values=["0"])
    found = await client.query(text="owl", top_k=64, filter=pb.Filter(conditions=[even]))
    assert {hit.id for hit in found.hits} == {id for id in TEXTS if len(id) % 2 == 0}
    changed = await client.put("d1", "a hedgehog")
    assert (await client.query(text="a hedgehog", top_k=1)).hits[0].id == "d1"
    (hit,) = (await client.query(document_ids=["d1"], as_of=changed.sequence - 1, include_text=True)).hits
    assert hit.text == TEXTS["d1"]
    (record,) = await client.fetch([hit.gradient_digest])
    assert record[0] == hit.gradient_digest
    await client.delete("d1", purge=True)
    await client.refused(client.fetch([hit.gradient_digest]), NotFoundError)
    if config.objects is not None:
        assert not (config.data_dir / "blobs").exists()
        names = {name for name in RemoteObjects.at(config.objects).list() if "/" in name}
        assert len(names) == 29 and name_of(hit.gradient_digest) not in names
    listed = await client.list(page_size=100)
    assert {entry.id for entry in listed.documents} == TEXTS.keys() - {"d1"}
    stats = await client.stats()
    assert stats.sequence == stats.indexed_sequence == 32


@pytest.mark.asyncio
async def test_a_bank_that_starts_again_has_everything(config: BankConfig) -> None:
    for _ in range(2):
        async with (
            BankServer(config, HashEncoder(), HashEmbedder()) as server,
            Client(server.address.target) as client,
        ):
            await client.ingest(*({"id": id, "text": text} for id, text in TEXTS.items()))
            assert (await client.stats()).sequence == 30
            assert (await client.query(text=TEXTS["d7"], top_k=1)).hits[0].id == "d7"
    counts = await scrub(config, HashEncoder(), HashEmbedder())
    assert (counts.num_gradients, counts.num_lost) == (30, 0)


@pytest.mark.asyncio
async def test_a_snapshot_is_refused_with_another_way(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="pg_dump"):
        async with asyncio.timeout(10):
            call = client.stub.CreateSnapshot(pb.CreateSnapshotRequest(target=str(tmp_path / "snapshot")))
            await errors_of(call)


@pytest.mark.asyncio
async def test_calls_fail_soon_while_the_server_is_away_and_go_on_afterwards(
    client: Client, own_server: PostgresServer
) -> None:
    await client.put("before", "an owl")
    await asyncio.to_thread(own_server.stop)
    for call in (
        lambda: client.put("lost", "a comet"),
        lambda: client.query(text="an owl", top_k=1),
        lambda: client.delete("before"),
        lambda: client.list(),
    ):
        began = time.monotonic()
        await client.refused(call(), UnavailableError)
        assert time.monotonic() - began < 5
    own_server.start()  # in this thread: the server ends with the thread that started it
    while True:  # the test's own limit ends it
        try:
            after = await client.put("after", "a comet")
            break
        except UnavailableError:
            await asyncio.sleep(0.05)
    assert after.sequence == 2
    assert {hit.id for hit in (await client.query(text="owl comet", top_k=9)).hits} == {"before", "after"}


@pytest.mark.only_test_all
@pytest.mark.asyncio
async def test_a_server_that_hangs_delays_calls_and_loses_none(client: Client, own_server: PostgresServer) -> None:
    await client.put("before", "an owl")
    own_server.pause()
    try:
        waiting = asyncio.create_task(client.put("during", "a comet"))
        await asyncio.sleep(10)
        assert not waiting.done()
    finally:
        own_server.resume()
    assert (await waiting).sequence == 2
    assert {hit.id for hit in (await client.query(text="owl comet", top_k=9)).hits} == {"before", "during"}


@pytest.mark.only_test_all
@pytest.mark.asyncio
async def test_a_server_without_connections_to_spare_fails_reads_and_loses_nothing(data_dir: Path) -> None:
    few = started("-c", "max_connections=60", "-c", "superuser_reserved_connections=0")
    catalog = few.new_schema()
    config = BankConfig(data_dir=data_dir, catalog=catalog)
    try:
        async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
            await client.ingest(*({"id": id, "text": text} for id, text in TEXTS.items()))
        async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
            with ExitStack() as others:
                with pytest.raises(psycopg.OperationalError, match="too many clients"):
                    while True:
                        others.enter_context(psycopg.connect(catalog))
                calls = (client.query(text=TEXTS["d7"], top_k=1) for _ in range(40))
                answers = await asyncio.gather(*calls, return_exceptions=True)
                failed = [answer for answer in answers if isinstance(answer, BaseException)]
                assert failed and all(isinstance(error, UnavailableError) for error in failed)
                assert all(answer.hits[0].id == "d7" for answer in answers if answer not in failed)
                with pytest.raises(RuntimeError, match="must be reachable, got: .*too many clients"):
                    check_startable(BankConfig(data_dir=data_dir.with_name("other"), catalog=catalog))
            assert (await client.put("new", "a comet")).sequence == 31
            assert (await client.query(text="a comet", top_k=1)).hits[0].id == "new"
            assert len((await client.list(page_size=100)).documents) == 31
    finally:
        few.remove()


async def errors_of(call: AsyncIterator[object]) -> None:
    from bank_service.testing.client import own_errors

    async with own_errors():
        async for _ in call:
            pass
