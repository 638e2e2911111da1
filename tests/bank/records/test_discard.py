"""Gradients that nobody names any more, and the cache: in batches, in every order of readers, with the server away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bank_service.bank import Bank
from bank_service.blobs.blob_store import BlobStore
from bank_service.cache import redis_node
from bank_service.cache.redis_cache import KEY_PREFIX, RedisCache
from bank_service.records.discarder import Discarder
from bank_service.runtime.metrics import BankMetrics
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.upkeep import history_cleaner
from bank_service.values.config import BankConfig
from bank_service.values.documents import Query
from tests.bank import inside
from tests.bank.catalog.test_history import blobs, put
from tests.bank.search.test_as_of import open_bank


@asynccontextmanager
async def bank_with(url: str, folder: Path, **settings: object) -> AsyncIterator[tuple[Bank, Redis]]:
    """A bank, and its cache's server, which others stop and go on with."""
    folder.mkdir(exist_ok=True)
    config = BankConfig(data_dir=folder, redis_url=url, **{"cache_timeout_ms": 5000, **settings})  # type: ignore[arg-type]
    bank = await Bank.open(config, HashEncoder(), HashEmbedder(), url, BankMetrics())
    redis = Redis.from_url(url)
    try:
        yield bank, redis
    finally:
        await redis.aclose()
        await bank.close()


async def read(bank: Bank, *ids: str) -> list[str]:
    """The digests of documents whose gradients are in the cache now."""
    answer = await bank.query(Query("", document_ids=ids, include_gradients=True))
    await inside.background(bank).drain()
    return [hit.gradient_digest for hit in answer.hits]


async def keys(redis: Redis) -> set[str]:
    return {key.decode().removeprefix(KEY_PREFIX) async for key in redis.scan_iter()}


async def until_gone(redis: Redis, digest: str) -> None:
    async with asyncio.timeout(60):
        while digest in await keys(redis):
            await asyncio.sleep(0.05)


async def num_reads(redis: Redis) -> int:
    """How often the server has read from its clients."""
    return int((await redis.info("stats"))["total_reads_processed"])


@asynccontextmanager
async def cache_with(url: str, ttl_seconds: int, timeout_ms: int) -> AsyncIterator[RedisCache]:
    with ThreadPoolExecutor(1) as pool:
        cache = RedisCache(url, timeout_ms, ttl_seconds, pool)
        async with asyncio.timeout(60):  # a busy machine may be slower than the timeout
            while not await cache.is_available():
                pass
        yield cache
        await cache.close()


@asynccontextmanager
async def stopped(url: str) -> AsyncIterator[Callable[[], None]]:
    """The server answers nobody before the end, or a call of what this gives."""
    redis = Redis.from_url(url)
    pid = (await redis.info("server"))["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGCONT)
        await redis.aclose()


@pytest.mark.asyncio
async def test_many_gradients_are_discarded_by_one_look_and_one_call_of_the_cache(
    data_dir: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_cleaner, "CLEAN_SECONDS", 3600)  # this test cleans
    looks: list[int] = []
    references = Discarder.references

    def counted(discarder: Discarder, digests: list[str]) -> set[str]:
        looks.append(len(digests))
        return references(discarder, digests)

    async with bank_with(redis_server, data_dir, history_seconds=1) as (bank, redis):
        for number in range(40):
            await put(bank, "a", f"text number {number}")
            await read(bank, "a")
        assert len(await keys(redis)) == 40
        await asyncio.sleep(1.1)
        monkeypatch.setattr(Discarder, "references", counted)
        before = await num_reads(redis)
        await inside.upkeep(bank).history_cleaner.clean()
        assert await num_reads(redis) == before + 2, "one of them is this one"
        assert await keys(redis) == blobs(data_dir) and len(blobs(data_dir)) == 1
        assert looks == [39]


@pytest.mark.asyncio
async def test_a_gradient_goes_from_the_cache_also_where_its_file_went_before(
    data_dir: Path, redis_server: str
) -> None:
    async with bank_with(redis_server, data_dir) as (bank, redis):
        await put(bank, "a", "a text")
        (digest,) = await read(bank, "a")
        assert await keys(redis) == {digest}
        inside.stores(bank).blobs.path(digest).unlink()
        await bank.delete("", "a", purge=True)
        assert not await keys(redis)


@pytest.mark.asyncio
async def test_a_reader_that_is_late_does_not_bring_a_discarded_gradient_back(
    data_dir: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    offer = RedisCache.put

    async def late(cache: RedisCache, records: Mapping[str, bytes]) -> None:
        reached.set()
        await may_go_on.wait()
        await offer(cache, records)

    monkeypatch.setattr(RedisCache, "put", late)
    async with bank_with(redis_server, data_dir) as (bank, redis):
        for id in ("a", "b"):
            await put(bank, id, f"text of {id}")
        await bank.query(Query("", document_ids=("a", "b"), include_gradients=True))
        await reached.wait()
        await bank.delete("", "a", purge=True)
        may_go_on.set()
        await inside.background(bank).drain()
        assert await keys(redis) == blobs(data_dir) and len(blobs(data_dir)) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("purge", [False, True])
async def test_what_a_resting_cache_was_not_told_it_is_told_when_it_is_back(
    data_dir: Path, redis_server: str, purge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_node, "COOL_DOWN_SECONDS", 5.0)
    async with bank_with(redis_server, data_dir, cache_timeout_ms=1000) as (bank, redis):
        for id in ("a", "b"):
            await put(bank, id, f"text of {id}")
        digest, kept = await read(bank, "a", "b")
        pid = (await redis.info("server"))["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            await bank.query(Query("", document_ids=("b",), include_gradients=True))  # it fails, and rests
        finally:
            os.kill(pid, signal.SIGCONT)
        await bank.delete("", "a", purge=purge)
        await inside.background(bank).drain()
        assert digest in await keys(redis), "else this test shows nothing"
        await until_gone(redis, digest)
        assert kept in await keys(redis)
        async with asyncio.timeout(60):
            while not await inside.upkeep(bank).eraser.erase():
                await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_a_put_that_the_server_answered_too_late_leaves_nothing_of_a_discarded_gradient(
    data_dir: Path, redis_server: str
) -> None:
    async with bank_with(redis_server, data_dir, cache_timeout_ms=1000) as (bank, redis):
        await put(bank, "a", "a text")
        digest = (await bank.get("", "a")).gradient.digest
        record = inside.stores(bank).blobs.get(digest)
        cache = inside.stores(bank).cache
        assert await cache.is_available()
        pid = (await redis.info("server"))["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            await cache.put({digest: record})  # times out, the server has it before it
            assert cache.counts.errors == 1
            await bank.delete("", "a", purge=True)
        finally:
            os.kill(pid, signal.SIGCONT)
        await until_gone(redis, digest)
        await asyncio.sleep(1.5)
        assert digest not in await keys(redis)


@pytest.mark.asyncio
async def test_a_failed_put_is_remembered_for_as_long_as_the_server_may_have_it(
    redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_node, "COOL_DOWN_SECONDS", 0.0)
    async with cache_with(redis_server, ttl_seconds=60, timeout_ms=200) as cache, stopped(redis_server) as go_on:
        await cache.put({"a": b"a record"})  # nobody removes it
        assert cache.may_have(["a"]) and not cache.may_have(["b"])
        go_on()
        await cache.retry()
        assert not cache.may_have(["a"]) and not await cache.get(["a"])
        await cache.put({"a": b"a record"})
        assert not cache.may_have(["a"])


@pytest.mark.asyncio
async def test_only_a_write_puts_off_when_an_unremoved_gradient_has_expired(
    redis_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_node, "COOL_DOWN_SECONDS", 0.0)
    async with cache_with(redis_server, ttl_seconds=2, timeout_ms=100) as cache, stopped(redis_server) as go_on:
        begun = time.monotonic()
        while cache.may_have(["a"]) or cache.counts.errors < 3:
            await cache.remove(["a"])
            assert time.monotonic() < begun + 60
            await cache.retry()
        assert caplog.text.count("the gradient cache failed") == 1, "an outage is said once a minute"
        await cache.remove(["a"])
        (expired,) = cache._unremoved.values()
        go_on()
        await asyncio.sleep(0.1)
        await cache.put({"a": b"a record"})
        (later,) = cache._unremoved.values()
        assert later > expired
        await cache.retry()
        assert not cache._unremoved


@pytest.mark.asyncio
async def test_a_start_sweep_that_failed_is_made_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_bank(data_dir) as bank:
        path = inside.stores(bank).blobs.path("ab" * 32)
    assert path is not None
    path.write_bytes(b"left by a crash")
    failures = [OSError("the folder can't be read")] * 2
    listed = BlobStore._digests

    def failing(blobs: BlobStore) -> Iterator[str]:
        if failures:
            raise failures.pop()
        return listed(blobs)

    monkeypatch.setattr(BlobStore, "_digests", failing)
    async with open_bank(data_dir) as bank:
        async with asyncio.timeout(60):
            while path.exists() or inside.discarder(bank)._must_sweep:
                await asyncio.sleep(0.05)
        assert not failures
