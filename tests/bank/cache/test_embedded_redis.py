from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from bank_service.cache.embedded_redis import EmbeddedRedis
from bank_service.cache.redis_cache import RedisCache
from bank_service.wire.record import record_digest

MIB = 2**20


@pytest.mark.asyncio
async def test_it_starts_answers_and_leaves_nothing_running(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path, 8 * MIB)
    await redis.start()
    pid = redis.pid
    client = Redis.from_url(redis.url)
    assert (await client.info("server"))["process_id"] == pid
    assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "allkeys-lru"
    await client.aclose()
    socket = tmp_path / "redis" / "redis.sock"
    assert socket.stat().st_mode & 0o077 == 0
    await redis.stop()
    assert not psutil.pid_exists(pid) and not socket.exists()


@pytest.mark.asyncio
async def test_a_long_data_directory_gets_its_socket_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    first = EmbeddedRedis(folder, 8 * MIB)
    await first.start()
    socket = Path(first.url.removeprefix("unix://"))
    assert len(os.fsencode(socket)) < 107 and socket.parent.stat().st_mode & 0o077 == 0
    assert EmbeddedRedis(folder, MIB).url == first.url, "found again, so that no folders pile up"
    await first.stop()
    assert not socket.parent.exists(), "nothing stays among the system's temporary files"


@pytest.mark.asyncio
async def test_a_long_folder_of_temporary_files_is_not_used_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    redis = EmbeddedRedis(folder, 8 * MIB)
    await redis.start()
    assert len(os.fsencode(redis.url.removeprefix("unix://"))) < 107
    await redis.stop()


@pytest.mark.asyncio
async def test_the_oldest_records_make_room_where_the_budget_is_full(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    redis = EmbeddedRedis(tmp_path, 8 * MIB)
    await redis.start()
    cache = RedisCache(redis.url, 2000, 60, pool)
    records = {record_digest(record): record for record in (bytes([n]) * MIB for n in range(20))}
    for digest, record in records.items():
        await cache.put({digest: record})
    found = await cache.get(list(records))
    assert 2 <= len(found) <= 8 and list(records)[-1] in found
    assert all(records[digest] == record for digest, record in found.items())
    assert (cache.counts.hits, cache.counts.misses, cache.counts.errors) == (len(found), 20 - len(found), 0)
    await cache.put({"0" * 64: bytes(9 * MIB)})  # more than the whole budget
    assert await cache.get(["0" * 64]) == {}
    await cache.close()
    await redis.stop()


def test_it_ends_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from bank_service.cache.embedded_redis import EmbeddedRedis\n"
        "async def main():\n"
        "    redis = EmbeddedRedis(Path(sys.argv[1]), 2**23)\n"
        "    await redis.start()\n"
        "    sys.stdout.write(f'{redis.pid}\\n'); sys.stdout.flush()\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.Process(pid).is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server must end with its parent"
        time.sleep(0.02)


@pytest.mark.asyncio
async def test_two_servers_of_two_directories_do_not_meet(tmp_path: Path) -> None:
    servers = [EmbeddedRedis(tmp_path / name, 8 * MIB) for name in ("one", "two") if not (tmp_path / name).mkdir()]
    await asyncio.gather(*(server.start() for server in servers))
    one, two = (Redis.from_url(server.url) for server in servers)
    await one.set("key", "value")
    assert await two.get("key") is None
    for client in (one, two):
        await client.aclose()
    for server in servers:
        await server.stop()
