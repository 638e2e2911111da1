"""The suite of every cache of records, run on each, with its server alive, silent and dead."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis, RedisCluster

from bank_service.cache import redis_node
from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.cache.record_cache import RecordCache
from bank_service.cache.redis_cache import KEY_PREFIX, RedisCache
from bank_service.wire.record import record_digest
from tests.bank.redis_servers import redis_cluster, until

TIMEOUT_MS = 30_000  # of a server that answers, on a machine however busy
SILENT_MS = 500  # of a server that never will
TTL_SECONDS = 60
RECORDS = {record_digest(record): record for record in (b"one", b"two", b"three")}
ONE, TWO, THREE = RECORDS


@dataclass(frozen=True, slots=True)
class Backend:
    """Servers and what tests do to them behind the cache's back."""

    url: str
    pids: list[int]

    @asynccontextmanager
    async def cache(self, timeout_ms: int = TIMEOUT_MS) -> AsyncIterator[RecordCache]:
        with ThreadPoolExecutor(1) as pool:
            cache: RecordCache = RedisCache(self.url, timeout_ms, TTL_SECONDS, pool)
            try:
                yield cache
            finally:
                await cache.close()

    def send(self, signal_number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, signal_number)

    def client(self) -> Any:
        if self.url.startswith("redis+cluster://"):
            return RedisCluster.from_url(self.url.replace("+cluster", "").split(",")[0])
        return Redis.from_url(self.url)

    async def spoil(self, digest: str) -> None:
        async with self.client() as redis:
            await redis.set(KEY_PREFIX + digest, b"rot")


@pytest_asyncio.fixture(params=["embedded valkey", "redis-server", "cluster"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    if request.param == "redis-server":
        url = request.getfixturevalue("redis_server")
        async with Redis.from_url(url) as redis:
            pid = (await redis.info("server"))["process_id"]
        yield Backend(url, [pid])
        return
    if request.param == "cluster":
        async with redis_cluster(tmp_path) as cluster:
            yield Backend(cluster.url, [server.pid for server in cluster.servers])
        return
    server = EmbeddedRedis(tmp_path, 8 * 2**20)
    await server.start()
    try:
        yield Backend(server.url, [server.pid])
    finally:
        await server.stop()


@pytest.mark.parametrize("scheme", ["redis", "rediss+cluster", "redis+sentinel"])
def test_an_option_that_redis_does_not_know_is_refused_without_the_password(
    pool: ThreadPoolExecutor, scheme: str
) -> None:
    service = "/bank" if scheme == "redis+sentinel" else ""
    with pytest.raises(ValueError, match="redis_url must be like redis://") as caught:
        RedisCache(f"{scheme}://:s3cret@h{service}?s3cret=1", TIMEOUT_MS, TTL_SECONDS, pool)
    assert "s3cret" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.asyncio
async def test_what_was_offered_is_found_and_counted(backend: Backend) -> None:
    async with backend.cache() as cache:
        assert await cache.is_available()
        assert await cache.get(list(RECORDS)) == {} and await cache.get([]) == {}
        await cache.put({ONE: RECORDS[ONE], TWO: RECORDS[TWO]})
        await cache.put({})
        assert await cache.get(list(RECORDS)) == {ONE: RECORDS[ONE], TWO: RECORDS[TWO]}
        assert (cache.counts.hits, cache.counts.misses, cache.counts.errors) == (2, 4, 0)


@pytest.mark.asyncio
async def test_what_was_removed_is_gone_and_the_rest_is_not(backend: Backend) -> None:
    async with backend.cache() as cache:
        await cache.put(RECORDS)
        await cache.remove([ONE, THREE])
        assert set(await cache.get(list(RECORDS))) == {TWO}
        assert not cache.may_have(RECORDS)
        await cache.remove([ONE])  # again


@pytest.mark.asyncio
async def test_a_record_that_does_not_match_its_digest_is_never_given_and_leaves_the_cache(backend: Backend) -> None:
    async with backend.cache() as cache:
        await cache.put(RECORDS)
        await backend.spoil(ONE)
        assert set(await cache.get(list(RECORDS))) == {TWO, THREE}
        assert (cache.counts.corrupt, cache.counts.misses) == (1, 1)
        await cache.get([ONE])
        assert cache.counts.corrupt == 1, "it was removed"


@pytest.mark.asyncio
async def test_no_record_stays_for_ever(backend: Backend) -> None:
    async with backend.cache() as cache:
        await cache.put(RECORDS)
        async with backend.client() as redis:
            for digest in RECORDS:
                assert 0 < await redis.pttl(KEY_PREFIX + digest) <= TTL_SECONDS * 1000


@pytest.mark.asyncio
async def test_a_silent_cache_raises_nothing_and_removes_later_what_it_could_not_remove(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_node, "COOL_DOWN_SECONDS", 0.0)
    async with backend.cache(SILENT_MS) as cache:

        async def is_there() -> bool:
            await cache.put(RECORDS)
            await cache.retry()
            return not cache.may_have(RECORDS)

        await until(is_there)
        backend.send(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):
                assert not await cache.is_available()
                assert await cache.get([ONE]) == {}
                await cache.remove([ONE])
            assert cache.counts.errors >= 2 and cache.may_have([ONE, TWO]) and not cache.may_have([TWO])
        finally:
            backend.send(signal.SIGCONT)

        async def is_removed() -> bool:
            await cache.retry()
            return not cache.may_have([ONE])

        await until(is_removed)
        assert await cache.get([ONE]) == {}


@pytest.mark.asyncio
async def test_a_cache_that_failed_is_left_alone_for_a_moment(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_node, "COOL_DOWN_SECONDS", 600.0)
    async with backend.cache(SILENT_MS) as cache:
        backend.send(signal.SIGSTOP)
        try:
            await cache.put(RECORDS)
            await cache.get([ONE])
            errors = cache.counts.errors
            for _ in range(20):
                await cache.put(RECORDS)
                assert await cache.get([ONE]) == {}
            assert cache.counts.errors == errors >= 1, "each call would have waited and failed"
            assert cache.counts.misses == 21
        finally:
            backend.send(signal.SIGCONT)


@pytest.mark.asyncio
async def test_a_dead_cache_is_a_cache_without_records(backend: Backend) -> None:
    async with backend.cache(SILENT_MS) as cache:
        await cache.put(RECORDS)
        backend.send(signal.SIGCONT)
        backend.send(signal.SIGKILL)
        async with asyncio.timeout(30):
            assert await cache.get(list(RECORDS)) == {}
            await cache.remove([ONE])
            await cache.retry()
        assert cache.may_have([ONE])
