"""Two PostgreSQL servers, of which the primary is killed and the synchronous standby is promoted."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.catalog.postgres.connect import reader_of, shown
from bank_service.service.engine_checks import engine_states
from bank_service.service.preflight import check_startable
from bank_service.service.server import BankServer
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from benchmarks.servers.object_servers import free_ports
from benchmarks.servers.postgres_server import PostgresServer
from regrad_vllm.client import AsyncBank, Document, Query
from tests.bank.postgres_server import started
from tests.bank.test_node_faults import Load, all_is_there, tried, two_nodes


@pytest.fixture
def servers() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """The primary and its standby, which has each commit before it is acknowledged."""
    primary = started()
    standby = started(primary=primary)
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    yield primary, standby
    for server in (primary, standby):
        server.remove()


def of_both(servers: tuple[PostgresServer, PostgresServer]) -> str:
    """The URL of a new schema at the server that takes writes."""
    first, second = (quote(str(server.folder), safe="") for server in servers)
    url = servers[0].new_schema().replace("&options", "&target_session_attrs=read-write&options")
    return url.replace(first, f"{first}%2C{second}")


@pytest.mark.only_test_all
@pytest.mark.timeout(300)
@pytest.mark.asyncio
async def test_two_nodes_go_on_at_a_promoted_standby_with_all_that_was_acknowledged(
    tmp_path: Path, servers: tuple[PostgresServer, PostgresServer], objects_url: str
) -> None:
    primary, standby = servers
    async with two_nodes(tmp_path, of_both(servers), objects_url) as (_, clients):
        async with Load(clients) as load:
            await asyncio.to_thread(primary.stop, signal.SIGKILL)
            await asyncio.sleep(2)
            await asyncio.to_thread(standby.promote)
            await load.goes_on()
        await all_is_there(load, RemoteObjects.at(objects_url))


@pytest.mark.asyncio
async def test_queries_leave_a_replica_that_is_promoted(
    tmp_path: Path, servers: tuple[PostgresServer, PostgresServer]
) -> None:
    primary, standby = servers
    catalog = of_both(servers)
    replica = standby.beside(catalog)
    config = BankConfig(data_dir=tmp_path, catalog=catalog, catalog_read=replica)
    async with (
        BankServer(config, HashEncoder(), HashEmbedder()) as server,
        AsyncBank(server.address.target, spec=spec_of(), attempts=1) as client,
    ):

        async def put(number: int) -> None:
            async for _ in client.ingest([Document(f"d{number}", f"owl {number}")]):
                pass

        async def rounds(first: int) -> None:
            for number in range(first, first + 10):
                await tried(lambda number=number: put(number))
                found = await tried(lambda number=number: client.query(Query(f"owl {number}", top_k=64)))
                assert {hit.id for hit in found.hits} == {f"d{each}" for each in range(number + 1)}

        await rounds(0)
        while not (before := (await client.stats()).replica) or not before.num_reads:
            await client.query("owl")
        await asyncio.to_thread(primary.stop, signal.SIGKILL)
        going_on = asyncio.create_task(rounds(10))
        await asyncio.sleep(2)
        assert not going_on.done()
        await asyncio.to_thread(standby.promote)
        await going_on
        while (after := (await client.stats()).replica) is None or after.is_up:  # until the replica is looked at again
            await asyncio.sleep(0.1)
        assert after.num_down > before.num_down
    check_startable(config)
    (state,) = (state for state in await engine_states(config) if state.engine == "PostgreSQL replica")
    assert state.reached and [lack.stops for lack in state.lacks] == [False]
    async with (
        BankServer(config, HashEncoder(), HashEmbedder()) as server,
        AsyncBank(server.address.target, spec=spec_of()) as client,
    ):
        assert len((await client.query(Query("owl 1", top_k=64))).hits) == 20
        again = (await client.stats()).replica
        assert again is not None and not again.is_up and again.staleness_ms is None


def test_several_hosts_with_ports_are_all_tried() -> None:
    ports = free_ports(2)
    url = f"postgresql://u:s3cret@127.0.0.1:{ports[0]},[::1]:{ports[1]}/bank?target_session_attrs=read-write"
    BankConfig(data_dir=Path("bank"), catalog=url)
    engine = reader_of(url)
    with pytest.raises(Exception, match="refused") as refusal:
        engine.connect()
    engine.dispose()
    assert all(f"port: '{port}'" in str(refusal.value) for port in ports)
    assert "s3cret" not in shown(url) and all(str(port) in shown(url) for port in ports)
