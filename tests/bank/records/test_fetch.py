"""Gradients out, with the cache and the blobs in every state they can be in."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bank_service.cache.redis_cache import KEY_PREFIX
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.errors import NotFoundError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import GradientSpec, record_digest


@asynccontextmanager
async def running(config: BankConfig, embedder: Embedder) -> AsyncIterator[Client]:
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        yield client


async def ingested(client: Client, count: int = 10) -> list[str]:
    responses = await client.ingest(*({"id": f"d{n}", "text": f"text number {n}"} for n in range(count)))
    return [response.gradient_digest for response in responses]


def blob(data_dir: Path, digest: str) -> Path:
    return data_dir / "blobs" / digest[:2] / digest[2:]


async def whole(client: Client, digests: list[str]) -> None:
    records = await client.fetch(digests)
    assert [digest for digest, _ in records] == digests
    assert all(record_digest(record) == digest for digest, record in records)


@pytest.mark.asyncio
async def test_records_come_in_the_order_asked_for_also_twice(client: Client) -> None:
    digests = await ingested(client)
    await whole(client, [*reversed(digests), digests[3], digests[3]])


@pytest.mark.asyncio
async def test_a_large_record_comes_in_chunks_of_at_most_1_mib(data_dir: Path, embedder: Embedder) -> None:
    encoder = HashEncoder()
    encoder.spec = GradientSpec(encoder.spec.fingerprint, encoder.spec.layout_id, ((2, 1_450_000),))
    config = BankConfig(data_dir=data_dir, codec="factors-2-2-8")
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        put = await client.put("a", "large")
        call = client.stub.FetchGradients(pb.FetchGradientsRequest(digests=[put.gradient_digest]))
        parts = [part async for part in call]
        assert [(part.offset, len(part.chunk)) for part in parts[:2]] == [(0, 2**20), (2**20, 2**20)]
        assert len(parts) == 3 and {part.record_bytes for part in parts} == {sum(len(part.chunk) for part in parts)}
        await whole(client, [put.gradient_digest])
        # 3 MB each: of 12 hits, those that fit a message of 32 MiB bring their gradients.
        await client.ingest(*({"text": f"large {n}"} for n in range(11)))
        hits = (await client.query(text="large", top_k=12, include_gradients=True)).hits
        inline = [bool(hit.gradient) for hit in hits]
        assert inline == [True] * 11 + [False] and hits[11].gradient_bytes > 2_900_000


@pytest.mark.asyncio
async def test_a_cached_record_is_served_without_its_blob_until_its_document_goes(
    client: Client, data_dir: Path
) -> None:
    digests = await ingested(client, 2)
    await cached(client, digests)
    blob(data_dir, digests[0]).unlink()
    await whole(client, digests)
    assert (await client.stats()).cache_hits >= 2
    await client.delete("d0")
    await client.refused(client.fetch([digests[0]]), NotFoundError)
    await whole(client, digests[1:])


async def _flush(server: BankServer) -> None:
    redis = Redis.from_url(_redis_url(server))
    await redis.flushall()
    await redis.aclose()


def _redis_url(server: BankServer) -> str:
    return f"unix://{server.config.data_dir / 'redis' / 'redis.sock'}"


@pytest.mark.asyncio
async def test_an_emptied_cache_is_filled_again(server: BankServer, client: Client) -> None:
    digests = await ingested(client)
    await _flush(server)
    await whole(client, digests)
    assert (await client.stats()).cache_misses >= 10
    await cached(client, digests)


async def cached(client: Client, digests: list[str]) -> None:
    """Reads the records until all come from the cache, which is filled after an answer."""
    for _ in range(100):
        before = await client.stats()
        await whole(client, digests)
        if (await client.stats()).cache_hits - before.cache_hits == len(digests):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the cache was not filled")


@pytest.mark.asyncio
async def test_what_is_stored_takes_no_place_in_the_cache_before_it_is_read(server: BankServer, client: Client) -> None:
    digests = await ingested(client)
    redis = Redis.from_url(_redis_url(server))
    assert await redis.dbsize() == 0
    await cached(client, digests[:3])
    assert await redis.dbsize() == 3
    await redis.aclose()


@pytest.mark.asyncio
async def test_garbage_in_the_cache_is_never_served(server: BankServer, client: Client) -> None:
    digests = await ingested(client, 3)
    redis = Redis.from_url(_redis_url(server))
    await whole(client, digests)
    good = await redis.get(KEY_PREFIX + digests[2])
    await redis.set(KEY_PREFIX + digests[0], b"garbage")
    await redis.set(KEY_PREFIX + digests[1], good)  # a sound record, but another one
    await redis.delete(KEY_PREFIX + digests[2])
    await redis.lpush(KEY_PREFIX + digests[2], "not even a string")
    await whole(client, digests)
    await redis.aclose()
    assert server.metrics.registry.get_sample_value("regrad_bank_cache_records", {"outcome": "corrupt"}) == 2


@pytest.mark.asyncio
async def test_a_killed_embedded_redis_fails_no_call_and_is_started_again(server: BankServer, client: Client) -> None:
    digests = await ingested(client)
    redis = Redis.from_url(_redis_url(server))
    pid = int((await redis.info("server"))["process_id"])
    await redis.aclose()
    os.kill(pid, signal.SIGKILL)
    await whole(client, digests)
    await client.put("new", "a new text")
    assert (await client.query(text="text", top_k=3, include_gradients=True)).hits[0].gradient
    for _ in range(100):
        if (await client.stats()).cache_available:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("the embedded Redis server did not come back")
    await whole(client, digests)


@pytest.mark.asyncio
async def test_a_real_redis_server_by_url_serves_as_the_cache(
    data_dir: Path, embedder: Embedder, redis_server: str
) -> None:
    async with running(BankConfig(data_dir=data_dir, redis_url=redis_server), embedder) as client:
        assert not (data_dir / "redis").exists()
        digests = await ingested(client)
        redis = Redis.from_url(redis_server)
        await cached(client, digests)
        before = await client.stats()
        await whole(client, digests)
        after = await client.stats()
        assert (after.cache_hits - before.cache_hits, after.cache_available) == (10, True)
        assert record_digest(await redis.get(KEY_PREFIX + digests[0])) == digests[0]
        await client.delete("d0")
        for _ in range(100):
            if not await redis.exists(KEY_PREFIX + digests[0]):
                break
            await asyncio.sleep(0.02)
        assert await redis.dbsize() == 9
        await redis.aclose()


@pytest.mark.asyncio
async def test_every_cached_record_expires_and_a_redis_server_without_a_limit_is_warned_of(
    data_dir: Path, embedder: Embedder, redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis = Redis.from_url(redis_server)
    config = BankConfig(data_dir=data_dir, redis_url=redis_server, cache_ttl_seconds=50, cache_timeout_ms=5000)
    async with running(config, embedder) as client:
        await whole(client, await ingested(client))
    # Closed, the bank has written what it had to.
    assert "maxmemory" not in caplog.text, "64 MiB is a limit"
    times = [await redis.ttl(key) async for key in redis.scan_iter(KEY_PREFIX + "*")]
    assert len(times) == 10 and all(0 < seconds <= 50 for seconds in times)
    await redis.config_set("maxmemory", 0)
    async with running(config, embedder):
        pass
    assert "got maxmemory 0: it grows by every gradient written in 50 s" in caplog.text
    await redis.aclose()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                accepted.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for connection in accepted:
        connection.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["refused", "silent"])
async def test_a_redis_server_that_is_down_or_silent_fails_no_call(
    data_dir: Path, embedder: Embedder, silent_server: str, kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = f"redis://127.0.0.1:{closed.getsockname()[1]}"
    url = silent_server if kind == "silent" else refused
    config = BankConfig(data_dir=data_dir, redis_url=url, cache_timeout_ms=2000)
    async with running(config, embedder) as client:
        digests = await ingested(client)
        started = asyncio.get_running_loop().time()
        for _ in range(20):
            await whole(client, digests)
        # One timeout, then the cache is left alone for a second; not one per call or record, which takes 40 s.
        assert asyncio.get_running_loop().time() - started < 20
        assert not (await client.stats()).cache_available
        assert (await client.query(text="text", top_k=3, include_gradients=True)).hits[0].gradient
