"""Fetches gradients of real size through the bank, with and without its cache, and by plain redis-py and files.

The Redis server is of the bank's own kind, on a socket that this process can use too. The plugin itself reaches Redis
only through the bank. "Without the cache" means that the server is emptied before each fetch. The bank then reads its
blobs, here from the kernel's page cache, and puts them into the server again. A bank that is given a database and an
object store reads them from that store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from bank_service.blobs.blob_store import BlobStore
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.cache.redis_cache import KEY_PREFIX
from bank_service.testing.client import Client, upload_of
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient
from benchmarks.bank.child_bank import BankProcess, running_bank
from benchmarks.bank.timing import one_at_a_time, percentile
from benchmarks.bank_ingest import spec_with
from regrad_vllm.reporting.intervals import spread

PER_FETCH = 3  # gradients, as many as a request takes by default in the plugin's settings
NUM_DOCUMENTS = 48  # all of them fit the cache
CACHE_BYTES = 2**30
FILL_TRIES = 100
REFILL_SECONDS = 0.05  # time for the bank to refill the cache after a fetch from its blobs

Fetch = Callable[[list[str]], Awaitable[None]]


def measure_fetch(
    folder: Path, num_values: int, num_fetches: int, repeats: int, shared: tuple[str, str] | None = None
) -> dict[str, Any]:
    """The figures of all ways, measured in turns. A first repeat warms up and doesn't count.

    ``shared``: the URLs of the catalog and of the object store; None: both are in the bank's folder.
    """
    return asyncio.run(_measure(folder, num_values, num_fetches, repeats, shared))


async def _measure(
    folder: Path, num_values: int, num_fetches: int, repeats: int, shared: tuple[str, str] | None
) -> dict[str, Any]:
    folder.mkdir()
    server = EmbeddedRedis(folder, CACHE_BYTES)
    await server.start()
    try:
        flags = ["--values", str(num_values), "--redis-url", server.url]
        if shared is not None:
            flags += ["--catalog", shared[0], "--objects", shared[1]]
        with running_bank(folder / "bank", *flags) as process:
            if shared is None:
                blobs = BlobStore.in_folder(folder / "bank" / "blobs")
            else:
                blobs = BlobStore(RemoteObjects.at(shared[1]))
            return await _in_turns(process, server.url, blobs, num_values, num_fetches, repeats)
    finally:
        await server.stop()


async def _in_turns(
    process: BankProcess, url: str, blobs: BlobStore, num_values: int, num_fetches: int, repeats: int
) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    times: dict[str, list[list[float]]] = {}
    async with Client(process.target) as client:
        digests, record_bytes = await _fill(client, generator, num_values)
        chosen = [generator.choice(digests, PER_FETCH, replace=False).tolist() for _ in range(num_fetches)]
        with Redis.from_url(url) as redis:
            ways = _ways(client, redis, blobs)
            hits = 0
            for repeat in range(repeats + 1):
                for name, fetch in ways.items() if repeat % 2 else list(ways.items())[::-1]:
                    await _fill_cache(client, redis, digests)
                    before = (await client.stats()).cache_hits
                    each = await _without_cache(redis, fetch, chosen) if name == "bank_blobs" else None
                    each = each or (await one_at_a_time(fetch, chosen))[0]
                    if repeat:
                        times.setdefault(name, []).append(each)
                    if name == "bank_redis":
                        hits += (await client.stats()).cache_hits - before
    hit_share = round(hits / (PER_FETCH * num_fetches * (repeats + 1)), 4)
    return {"hit_share_bank_redis": hit_share, **_figures(times, record_bytes)}


async def _fill_cache(client: Client, redis: Redis, digests: list[str]) -> None:
    """Fetches until the cache holds all gradients. The bank puts each one there after its fetch."""
    for _ in range(FILL_TRIES):
        await client.fetch(digests)
        await asyncio.sleep(REFILL_SECONDS)
        if redis.dbsize() == len(digests):
            return
    raise SystemExit(f"the cache must hold {len(digests)} gradients, got {redis.dbsize()}")


def _ways(client: Client, redis: Redis, blobs: BlobStore) -> dict[str, Fetch]:
    async def bank(digests: list[str]) -> None:
        await client.fetch(digests)

    async def get(digests: list[str]) -> None:
        _check([redis.get(KEY_PREFIX + digest) for digest in digests])

    async def mget(digests: list[str]) -> None:
        _check(redis.mget([KEY_PREFIX + digest for digest in digests]))

    async def files(digests: list[str]) -> None:
        _check([blobs.get(digest) for digest in digests])

    return {"redis_mget": mget, "redis_get": get, "bank_redis": bank, "bank_blobs": bank, "blobs_in_process": files}


def _check(records: Any) -> None:
    if not all(records):
        raise SystemExit("every gradient must be there, got one that is not")


async def _without_cache(redis: Redis, fetch: Fetch, chosen: list[list[str]]) -> list[float]:
    times = []
    for digests in chosen:
        redis.flushall()
        times += (await one_at_a_time(fetch, [digests]))[0]
        await asyncio.sleep(REFILL_SECONDS)
    return times


async def _fill(client: Client, generator: np.random.Generator, num_values: int) -> tuple[list[str], int]:
    """Stores the documents. Returns the digests of their gradients, and the bytes of each gradient."""
    spec = spec_with(num_values)
    digests, record = [], b""
    for number in range(NUM_DOCUMENTS):
        values = generator.standard_normal(num_values, np.float32)
        record = encode_gradient(values, spec, DEFAULT_CODEC)
        document = pb.Document(id=str(number), text=f"document {number}")
        parts = upload_of(document, record, chunk_bytes=2**20)
        digests.append((await client.upload(*parts))[0].gradient_digest)
    return digests, len(record)


def _figures(times: dict[str, list[list[float]]], record_bytes: int) -> dict[str, Any]:
    speeds = {
        name: [PER_FETCH * record_bytes * len(each) / sum(each) / 1e3 for each in passes]  # bytes/ms/1e3: MB/s
        for name, passes in times.items()
    }
    ratio = [bank / plain for bank, plain in zip(speeds["bank_redis"], speeds["redis_mget"], strict=True)]
    return {
        "record_bytes": record_bytes,
        "per_fetch": PER_FETCH,
        "fetches": len(times["bank_redis"][0]),
        "mb_s_ratio_redis": spread(ratio),
        "mb_s": {name: spread(each) for name, each in speeds.items()},
        "p50_ms": {name: spread([percentile(each, 50) for each in passes]) for name, passes in times.items()},
        "p99_ms": {name: spread([percentile(each, 99) for each in passes]) for name, passes in times.items()},
    }
