"""A bank whose queries read a streaming replica of its catalog, which lags, hangs and goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bank_service.catalog.postgres import postgres_replica
from bank_service.errors import InvalidArgumentError, NotFoundError
from bank_service.service.engine_checks import engine_states
from bank_service.service.preflight import check_startable
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.wire.generated import bank_pb2 as pb
from benchmarks.servers.postgres_server import PostgresServer
from regrad_vllm.client import AsyncBank, Document, Query
from tests.bank.postgres_server import shared_server, started

HOUR = 3_600_000


@pytest.fixture(scope="module")
def standby(own_server: PostgresServer) -> Iterator[PostgresServer]:
    server = started(primary=own_server)
    yield server
    server.remove()


@pytest.fixture
def config(
    tmp_path: Path, own_server: PostgresServer, standby: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BankConfig]:
    monkeypatch.setattr(postgres_replica, "HANG_SECONDS", 60.0)  # a busy machine is no hang
    catalog = own_server.new_schema()
    yield BankConfig(data_dir=tmp_path, catalog=catalog, catalog_read=standby.beside(catalog), max_staleness_ms=HOUR)
    standby.execute("SELECT pg_wal_replay_resume()")


@asynccontextmanager
async def bank(config: BankConfig, **settings: Any) -> AsyncIterator[tuple[AsyncBank, AsyncBank]]:
    """Two clients of a bank that can read its replica."""
    config = replace(config, **settings)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(BankServer(config, HashEncoder(), HashEmbedder()))
        clients = [await stack.enter_async_context(AsyncBank(server.address.target, spec=spec_of())) for _ in range(2)]
        await until_up(clients[0])
        yield clients[0], clients[1]


async def until_up(client: AsyncBank, wanted: bool = True) -> None:
    while (found := (await client.stats()).replica) is None or found.is_up is not wanted:  # the test's limit ends it
        await asyncio.sleep(0.05)


async def put(client: AsyncBank, id: str, text: str) -> None:
    async for _ in client.ingest([Document(id, text)]):
        pass


async def found(client: AsyncBank, text: str, **fields: Any) -> set[str]:
    return {hit.id for hit in (await client.query(Query(text, top_k=9, **fields))).hits}


@pytest.mark.asyncio
async def test_a_client_finds_its_own_writes_and_others_an_older_state(
    config: BankConfig, standby: PostgresServer
) -> None:
    assert config.catalog is not None
    async with bank(config) as (writer, other):
        await put(writer, "a", "an owl")
        await asyncio.to_thread(standby.beside, config.catalog)
        assert await found(other, "an owl") == {"a"}
        standby.execute("SELECT pg_wal_replay_pause()")
        await put(writer, "b", "a second owl")
        for retrieval in ("dense", "lexical", "hybrid"):
            assert await found(writer, "owl", retrieval=retrieval) == {"a", "b"}
            assert await found(other, "owl", retrieval=retrieval) == {"a"}
            assert await found(other, "owl", retrieval=retrieval, newest=True) == {"a", "b"}
        assert (await other.get("b")).document.text == "a second owl", "only queries read the replica"
        await writer.delete("a")
        assert await found(writer, "owl") == {"b"}
        assert await found(other, "owl") == {"a"}
        (hit,) = (await other.query(Query("owl", with_cue=1))).hits
        assert hit.cue[0].text == "an owl"
        replica = (await writer.stats()).replica
        assert replica is not None and replica.num_reads >= 5 and replica.num_behind >= 7 and replica.num_down == 0
        standby.execute("SELECT pg_wal_replay_resume()")
        await asyncio.to_thread(standby.beside, config.catalog)
        assert await found(other, "owl") == {"b"}


@pytest.mark.asyncio
async def test_no_query_reads_a_state_older_than_the_bound(config: BankConfig, standby: PostgresServer) -> None:
    assert config.catalog is not None
    async with bank(config, max_staleness_ms=400) as (writer, other):
        await put(writer, "a", "an owl")
        standby.execute("SELECT pg_wal_replay_pause()")
        for number in range(3):
            await put(writer, f"b{number}", f"owl {number}")
            await asyncio.sleep(0.5)
            assert f"b{number}" in await found(other, "owl")
        replica = (await writer.stats()).replica
        assert replica is not None and replica.staleness_ms is not None and replica.staleness_ms >= 1000
        assert replica.num_behind + replica.num_down >= 3, "on a busy machine there may be no mark"


@pytest.mark.asyncio
async def test_how_stale_the_replica_is_is_unknown_until_a_change_since_the_start_is_there(
    config: BankConfig, standby: PostgresServer
) -> None:
    assert config.catalog is not None
    async with bank(config) as (writer, _):
        await put(writer, "a", "an owl")
        await asyncio.to_thread(standby.beside, config.catalog)
        standby.execute("SELECT pg_wal_replay_pause()")
        await put(writer, "b", "a second owl")
    async with bank(config) as (_, other):
        replica = (await other.stats()).replica
        assert replica is not None and replica.is_up and replica.staleness_ms is None
        standby.execute("SELECT pg_wal_replay_resume()")
        while (replica := (await other.stats()).replica) is None or replica.staleness_ms is None:
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_a_write_without_an_answer_is_in_the_callers_next_query(
    config: BankConfig, own_server: PostgresServer, standby: PostgresServer
) -> None:
    assert config.catalog is not None

    async def unanswered(write: Coroutine[Any, Any, Any]) -> None:
        """Ends the call of a write that waits for a lock, before it is done."""
        with psycopg.connect(config.catalog or "") as connection:
            connection.execute("SELECT sequence FROM collection FOR UPDATE")
            task = asyncio.create_task(write)
            waiting = (
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'regrad-bank'"
            )
            while not connection.execute(waiting).fetchone():
                await asyncio.sleep(0.02)
                connection.execute("SELECT pg_stat_clear_snapshot()")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async with bank(config) as (writer, other):
        await put(writer, "a", "an owl")
        await asyncio.to_thread(standby.beside, config.catalog)
        standby.execute("SELECT pg_wal_replay_pause()")
        await unanswered(put(writer, "b", "a second owl"))
        while {listed.id async for listed in other.list()} != {"a", "b"}:
            await asyncio.sleep(0.02)
        assert await found(writer, "owl") == {"a", "b"} and await found(other, "owl") == {"a"}
        await put(writer, "c", "a third owl")
        await unanswered(writer.delete("a"))
        while {listed.id async for listed in other.list()} != {"b", "c"}:
            await asyncio.sleep(0.02)
        assert await found(writer, "owl") == {"b", "c"} and await found(other, "owl") == {"a"}


@pytest.mark.asyncio
async def test_after_an_upgrade_no_query_reads_the_earlier_learners_state(
    config: BankConfig, standby: PostgresServer, tmp_path: Path
) -> None:
    assert config.catalog is not None
    (learner := tmp_path / "next").mkdir()
    async with bank(config, learner_root=tmp_path) as (writer, other):
        await put(writer, "a", "an owl")
        async for _ in writer.upgrade("begin", str(learner)):
            pass
        await asyncio.to_thread(standby.beside, config.catalog)
        before = (await other.stats()).replica
        standby.execute("SELECT pg_wal_replay_pause()")
        async for _ in writer.upgrade("finish"):
            pass
        async with AsyncBank(other.address, spec=spec_of("next")) as following:
            assert (after := before) is not None
            while (
                after.num_behind == before.num_behind
            ):  # until it has looked at both servers, the replica counts as down
                (hit,) = (await following.query("an owl")).hits
                assert hit.gradient_digest == (await following.get("a")).gradient_digest
                assert (after := (await following.stats()).replica) is not None
            assert after.num_reads == before.num_reads
            standby.execute("SELECT pg_wal_replay_resume()")
            while after.num_reads == before.num_reads:
                (hit,) = (await following.query("an owl")).hits
                assert hit.gradient_digest == (await following.get("a")).gradient_digest
                assert (after := (await following.stats()).replica) is not None


@pytest.mark.asyncio
async def test_a_hit_whose_gradient_is_gone_is_searched_at_the_primary(
    config: BankConfig, standby: PostgresServer
) -> None:
    assert config.catalog is not None
    async with (
        BankServer(config, HashEncoder(), HashEmbedder()) as server,
        AsyncBank(server.address.target) as known,
        Client(server.address.target) as client,
    ):
        await until_up(known)
        await client.put("a", "an owl")
        await asyncio.to_thread(standby.beside, config.catalog)
        standby.execute("SELECT pg_wal_replay_pause()")
        await client.put("a", "an older owl")
        await client.put("a", "an old owl")
        asked = {"text": "an owl", "top_k": 1}
        assert (await client.query(**asked)).hits[0].version == 1
        (hit,) = (await client.query(**asked, include_gradients=True)).hits
        assert hit.version == 3 and hit.gradient
        (answer,) = await client.query_batch({**asked, "include_gradients": True})
        assert answer.hits[0].version == 3
        assert (await client.query(**asked)).hits[0].version == 1
        with pytest.raises(InvalidArgumentError, match="regrad-sequence must be a sequence"):
            async with own_errors():
                await client.stub.Query(pb.QueryRequest(**asked), metadata=(("regrad-sequence", "-1"),))


@pytest.mark.asyncio
async def test_queries_go_on_while_the_replica_loses_its_connections_and_is_down(
    config: BankConfig, standby: PostgresServer
) -> None:
    assert config.catalog is not None
    async with bank(config, max_staleness_ms=1000) as (writer, other):
        await put(writer, "a", "an owl")
        await asyncio.to_thread(standby.beside, config.catalog)
        stop = asyncio.Event()

        async def ask() -> int:
            number = 0
            while not stop.is_set():
                assert await found(other, "an owl") == {"a"}
                number += 1
            return number

        asking = [asyncio.create_task(ask()) for _ in range(6)]
        for _ in range(5):
            await asyncio.sleep(0.3)
            standby.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'regrad-bank' AND pid <> pg_backend_pid()"
            )
        standby.stop()
        await until_up(writer, wanted=False)
        standby.start()
        await until_up(writer)
        stop.set()
        assert min(await asyncio.gather(*asking)) > 5
        replica = (await writer.stats()).replica
        assert replica is not None and replica.num_reads and replica.num_down


@pytest.mark.only_test_all
@pytest.mark.asyncio
async def test_queries_go_on_while_the_replica_hangs(
    config: BankConfig, standby: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.catalog is not None
    monkeypatch.setattr(postgres_replica, "HANG_SECONDS", 3.0)
    async with bank(config, max_staleness_ms=1000) as (writer, other):
        await put(writer, "a", "an owl")
        await asyncio.to_thread(standby.beside, config.catalog)
        while not (before := (await writer.stats()).replica) or not before.num_reads:
            await found(other, "an owl")
        standby.pause()
        try:
            await asyncio.gather(*(found(other, "an owl") for _ in range(40)))
            await until_up(writer, wanted=False)
            await put(writer, "b", "a second owl")
            assert await found(other, "owl") == {"a", "b"}
            after = (await writer.stats()).replica
            assert after is not None and after.num_down > before.num_down
        finally:
            standby.resume()
        await until_up(writer)


@pytest.mark.asyncio
async def test_what_is_no_replica_of_the_catalog_is_refused_by_name(
    config: BankConfig, own_server: PostgresServer, standby: PostgresServer
) -> None:
    assert config.catalog is not None and config.catalog_read is not None
    for url, message in (
        (standby.beside(own_server.new_schema()), "with the schema bank_"),
        (config.catalog_read.replace("/bank?", "/postgres?"), "with the database bank, got postgres"),
        (shared_server().new_schema(), "with the cluster"),
    ):
        wrong = replace(config, catalog_read=url)
        with pytest.raises(RuntimeError, match=message):
            check_startable(wrong)
        with pytest.raises(RuntimeError, match=message):
            async with bank(wrong):
                pass
        (lack,) = (await states(wrong))["PostgreSQL replica"].lacks
        assert lack.stops and message in lack.remedy
    writing = replace(config, catalog_read=config.catalog)
    check_startable(writing)
    (lack,) = (await states(writing))["PostgreSQL replica"].lacks
    assert not lack.stops and "replica in recovery, got a server that takes writes" in lack.remedy
    state = (await states(config))["PostgreSQL replica"]
    assert state.reached and state.version.endswith(" bytes of log behind") and not state.lacks
    away = replace(config, catalog_read="postgresql:///bank?host=/nowhere")
    (lack,) = (await states(away))["PostgreSQL replica"].lacks
    assert lack.missing == "an answer" and not lack.stops
    alone = (await states(replace(config, catalog="postgresql:///bank?host=/nowhere")))["PostgreSQL replica"]
    assert alone.reached and alone.lacks[0].remedy == "make --catalog answer first"
    async with BankServer(away, HashEncoder(), HashEmbedder()) as server, AsyncBank(server.address.target) as client:
        await put(client, "a", "an owl")
        assert await found(client, "an owl") == {"a"}
        with pytest.raises(NotFoundError):
            await client.query(Query("an owl", namespace="nowhere"))


@pytest.mark.asyncio
async def test_a_replica_that_lacks_the_schema_yet_is_waited_for(
    config: BankConfig, own_server: PostgresServer, standby: PostgresServer
) -> None:
    standby.execute("SELECT pg_wal_replay_pause()")
    later = own_server.new_schema()
    assert config.catalog_read is not None
    url = config.catalog_read.partition("&options")[0] + later[later.index("&options") :]
    lagging = replace(config, catalog=later, catalog_read=url)
    check_startable(lagging)
    async with BankServer(lagging, HashEncoder(), HashEmbedder()) as server, AsyncBank(server.address.target) as client:
        await put(client, "a", "an owl")
        await until_up(client, wanted=False)
        assert await found(client, "an owl") == {"a"}
        standby.execute("SELECT pg_wal_replay_resume()")
        await until_up(client)


async def states(config: BankConfig) -> dict[str, Any]:
    return {state.engine: state for state in await engine_states(config)}
