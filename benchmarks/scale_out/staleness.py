"""How old are answers that one node reads from a replica, while a client writes through another node?

An answer's age is the time from the acknowledgement of the first change that it lacks until its query was sent. It is 0
where the answer lacks none. One process has both clients, so one clock counts.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bank_service.testing.client import Client
from benchmarks.bank.child_bank import running_bank
from benchmarks.bank.timing import percentile
from benchmarks.servers.postgres_server import PostgresServer
from regrad_vllm.reporting.intervals import spread

NUM_READERS = 4  # queries in flight
MAX_STALENESS_SECONDS = 1.0  # a bank's default
LEAST_SHARE = 0.5  # of the answers, from the replica
ID = "clock"


def measure_staleness(folder: Path, objects: str, seconds: float, repeats: int) -> dict[str, Any]:
    """``folder``: of the nodes. They have a database and a replica of their own."""
    with ExitStack() as stack:
        primary = PostgresServer()
        stack.callback(primary.remove)
        replica = PostgresServer(primary=primary)
        stack.callback(replica.remove)
        catalog = primary.new_schema()
        flags = ("--catalog", catalog, "--objects", objects, "--embedder", "hash")
        reads = ("--catalog-read", replica.beside(catalog))
        writing = stack.enter_context(running_bank(folder / "writing", *flags))
        reading = stack.enter_context(running_bank(folder / "reading", *flags, *reads))
        return asyncio.run(_measure(writing.target, reading.target, seconds, repeats))


def staleness_of(found: dict[str, Any]) -> float | None:
    """The main figure: p99 in milliseconds. None where the replica gave less than half of the answers: those of the
    primary lack nothing, and say nothing of the replica."""
    return found["p99_ms"]["median"] if found["share_at_replica"] >= LEAST_SHARE else None


async def _measure(writing: str, reading: str, seconds: float, repeats: int) -> dict[str, Any]:
    acknowledged: list[float] = []  # when the version was, by its number less 1
    passes, writes_per_s = [], []
    async with Client(writing) as writer, Client(reading) as reader:
        await _write(writer, acknowledged, 0.0)
        await asyncio.sleep(2 * MAX_STALENESS_SECONDS)  # every answer has this version
        before = (await reader.stats()).replica
        for _ in range(repeats):
            num_before = len(acknowledged)
            until = time.perf_counter() + seconds
            reads = (_read(reader, acknowledged, until) for _ in range(NUM_READERS))
            ages, *_ = await asyncio.gather(asyncio.gather(*reads), _write(writer, acknowledged, until))
            passes.append([age for each in ages for age in each])
            writes_per_s.append((len(acknowledged) - num_before) / seconds)
        after = (await reader.stats()).replica
    found = after.num_reads - before.num_reads
    elsewhere = after.num_behind + after.num_down - before.num_behind - before.num_down
    return {
        "p50_ms": spread([percentile(ages, 50) for ages in passes]),
        "p99_ms": spread([percentile(ages, 99) for ages in passes]),
        "max_ms": round(max(map(max, passes)), 4),
        "queries": sum(map(len, passes)),
        "share_at_replica": round(found / max(1, found + elsewhere), 4),
        "writes_per_s": spread(writes_per_s),
    }


async def _write(client: Client, acknowledged: list[float], until: float) -> None:
    """Writes version after version, one at least."""
    while True:
        version = len(acknowledged) + 1
        answer = await client.put(ID, f"it is {version}")
        acknowledged.append(time.perf_counter())
        if answer.version != version:
            raise RuntimeError(f"the version must be {version}, got {answer.version}")
        if time.perf_counter() > until:
            return


async def _read(client: Client, acknowledged: list[float], until: float) -> list[float]:
    """The age of each answer in milliseconds."""
    ages = []
    while (sent := time.perf_counter()) < until:
        (hit,) = (await client.query(document_ids=[ID])).hits
        lacks_since = acknowledged[hit.version] if hit.version < len(acknowledged) else sent
        ages.append(1e3 * max(0.0, sent - lacks_since))
    return ages
