"""Measures the resources that a cell uses: CPU time and memory of the processes, and counters of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from regrad_vllm.reporting.server_metrics import samples

if TYPE_CHECKING:
    import httpx


_VLLM = "VLLM::"
_MEMORY_SECONDS = 4.0  # between two readings; each is expensive, as the kernel adds up gigabytes of mappings
_SCRAPE_SECONDS = 1.0
_KV_USAGE = "vllm:kv_cache_usage_perc"
# Cache → (samples that count its lookups, the sample that counts its hits).
_CACHES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "prefix": (("vllm:prefix_cache_queries_total",), "vllm:prefix_cache_hits_total"),
    "arena": (
        ("regrad_arena_lookups_total{hit}", "regrad_arena_lookups_total{miss}"), "regrad_arena_lookups_total{hit}",
    ),
    "worker": (("regrad_worker_lookups{hit}", "regrad_worker_lookups{miss}"), "regrad_worker_lookups{hit}"),
}  # fmt: skip
_FETCHED = "regrad_fetched_bytes_total"
_POOL = "regrad_worker_bytes"
_PREEMPTIONS = "vllm:num_preemptions_total"


class Processes:
    """Finds the processes of each role.

    A server's own process is "<role> API". Its children are "<role> EngineCore" and "<role> Worker", by vLLM's titles.
    An engine core spins while it waits for its worker, so its CPU time doesn't measure work.
    """

    def __init__(self, roots: Mapping[str, int], servers: Collection[str], alone: Collection[str]) -> None:
        """roots: role → process id. servers: the roles of vLLM servers. alone: roles whose children don't count."""
        self._roots = dict(roots)
        self._servers = frozenset(servers)
        self._alone = frozenset(alone)

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time so far, by role."""
        total: dict[str, float] = {}
        for role, process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total[role] = total.get(role, 0.0) + times.user + times.system
        return total

    def memory_bytes(self) -> dict[str, int]:
        """Proportional set size by role: shared memory is divided among the processes."""
        total: dict[str, int] = {}
        for role, process in self._all():
            with contextlib.suppress(psutil.Error, OSError):
                total[role] = total.get(role, 0) + _proportional(process.pid)
        return total

    def _all(self) -> Iterator[tuple[str, psutil.Process]]:
        for role, pid in self._roots.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                yield (f"{role} API" if role in self._servers else role), root
                if role not in self._alone:
                    for child in root.children(recursive=True):
                        yield (f"{role} {_title(child)}" if role in self._servers else role), child


def _title(process: psutil.Process) -> str:
    """A process's title by vLLM, such as EngineCore or Worker. All other processes are "helpers"."""
    with contextlib.suppress(psutil.Error):
        words: list[str] = process.cmdline()[:1]
        if words and words[0].startswith(_VLLM):
            return words[0].removeprefix(_VLLM).split()[0].split("_")[0]
    return "helpers"


def _proportional(pid: int) -> int:
    """Bytes of one process's proportional set size, from the kernel's sum over its mappings."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(slots=True)
class MachineUse:
    """CPU time and memory of the processes, by role."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


@asynccontextmanager
async def used(processes: Processes) -> AsyncIterator[MachineUse]:
    """Watches the processes while the context lasts, and fills the result at its end.

    Memory is read every few seconds and at the end.
    """
    usage = MachineUse()
    before = processes.cpu_seconds()

    async def look() -> None:
        for role, size in (await asyncio.to_thread(processes.memory_bytes)).items():
            usage.peak_bytes[role] = max(usage.peak_bytes.get(role, 0), size)

    async def sample() -> None:
        while True:
            await asyncio.sleep(_MEMORY_SECONDS)
            await look()

    sampler = asyncio.create_task(sample())
    try:
        yield usage
    finally:
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        after = processes.cpu_seconds()
        await look()
        usage.cpu_s = {role: after[role] - before.get(role, 0.0) for role in after}


@dataclass(slots=True)
class Scraped:
    """The server's counters, filled at the end of the context. None or empty if the server has no such counter."""

    peak_kv_share: float | None = None
    preemptions: float | None = None
    fetched_bytes: float | None = None
    pool_bytes: float | None = None
    cache_hits: dict[str, float] = field(default_factory=dict)


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's counters now. httpx.HTTPError."""
    response = await client.get("/metrics")
    return samples(response.raise_for_status().text)


@asynccontextmanager
async def watched(client: httpx.AsyncClient | None) -> AsyncIterator[Scraped]:
    """Watches a server while the context lasts: its counters before and after, its KV cache every second."""
    import httpx

    scraped = Scraped()
    if client is None:
        yield scraped
        return
    before = await scrape(client)

    async def sample() -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):  # a missing sample is harmless
                now = await scrape(client)
                scraped.peak_kv_share = max(scraped.peak_kv_share or 0.0, now.get(_KV_USAGE, 0.0))
            await asyncio.sleep(_SCRAPE_SECONDS)

    sampler = asyncio.create_task(sample())
    try:
        yield scraped
    finally:
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        after = await scrape(client)
        change = {name: value - before.get(name, 0.0) for name, value in after.items()}
        scraped.fetched_bytes = change.get(_FETCHED)
        scraped.pool_bytes = after.get(_POOL)
        scraped.preemptions = change.get(_PREEMPTIONS)
        for cache, (lookups, hits) in _CACHES.items():
            total = sum(change.get(name, 0.0) for name in lookups)
            if total:
                scraped.cache_hits[cache] = change.get(hits, 0.0) / total
