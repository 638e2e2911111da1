"""CPU time and memory of the processes under load, by role."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_SAMPLE_SECONDS = 4.0  # the kernel adds up gigabytes of mappings each time
_VLLM = "VLLM::"


class Processes:
    """Roles → process trees. Of a server, its own process is "<role> API"; what vLLM starts is named as vLLM does,
    "<role> EngineCore" and "<role> Worker". An engine core spins while it waits for its worker: its CPU time is time
    that passed, not work."""

    def __init__(self, roots: Mapping[str, int], servers: Collection[str], alone: Collection[str]) -> None:
        """roots: role → process id. servers: the roles that are vLLM's. alone: those without what they started."""
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
        """Proportional set size by role: what processes share is divided among them."""
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
    """EngineCore, Worker …, as vLLM titles its processes; "helpers" for others (Python's resource tracker)."""
    with contextlib.suppress(psutil.Error):
        words: list[str] = process.cmdline()[:1]
        if words and words[0].startswith(_VLLM):
            return words[0].removeprefix(_VLLM).split()[0].split("_")[0]
    return "helpers"


def _proportional(pid: int) -> int:
    """Pss of one process, from the kernel's sum over its mappings."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(slots=True)
class Usage:
    """What was used between two moments."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


@asynccontextmanager
async def used(processes: Processes) -> AsyncIterator[Usage]:
    """Watches while the context lasts; filled when it ends. Memory is looked at every few seconds and at the end."""
    usage = Usage()
    before = processes.cpu_seconds()

    async def look() -> None:
        for role, size in (await asyncio.to_thread(processes.memory_bytes)).items():
            usage.peak_bytes[role] = max(usage.peak_bytes.get(role, 0), size)

    async def sample() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_SECONDS)
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
