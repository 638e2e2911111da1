"""The loop of a crash test: kill, restart, check."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bank_service.testing.client import Client
from bank_service.wire.errors import UnavailableError
from benchmarks.crash.clients import work_until_killed
from benchmarks.crash.expected import Model, Verdict
from benchmarks.crash.faults import POINTS, Fault
from benchmarks.crash.killable import END_SECONDS, Nursery, Process, end, has_ended
from benchmarks.crash.promises import check_bank, check_snapshot

NUM_WRITERS = 8
LONGEST_WORK_SECONDS = 0.8  # between a start and a kill at a random moment
LONGEST_START_SECONDS = 0.5
BACK_SECONDS = 20
MAX_PASSES = 8  # of a fault's point before the bank dies there
RARE = tuple(point for point in POINTS if "snapshot" in point or "sweep" in point)  # seconds from one pass to the next
WORK, START = "at work", "while it starts"  # kills of the bank at a random moment
DATABASE = "the database"  # kills of the catalog's server at a random moment; the bank goes on


@dataclass(slots=True)
class Run:
    """The kills of a run, and their results."""

    models: dict[str, Model]
    verdict: Verdict = field(default_factory=Verdict)
    kills: dict[str, int] = field(default_factory=dict)  # when → how many

    @property
    def num_acknowledged(self) -> int:
        return sum(model.num_acknowledged for model in self.models.values())


async def kill_again_and_again(
    nursery: Nursery,
    data_dir: Path,
    kills: Sequence[str],
    generator: random.Random,
    plant: str | None = None,
    progress: Callable[[Run], None] = lambda _: None,
    kill_database: Callable[[], None] | None = None,
) -> Run:
    """A kill for each of ``kills``, WORK, START, DATABASE or a point of ``benchmarks.crash.faults``, with a check after
    each. ``kill_database`` kills the catalog's server and starts it again."""
    target = data_dir.parent / "snapshot" if nursery.catalog is None else None
    run = Run({f"writer{number}": Model() for number in range(NUM_WRITERS)})
    for kill in kills:
        if kill == START:
            handle = await asyncio.to_thread(nursery.fork, data_dir, None, plant)
            await asyncio.sleep(generator.uniform(0, LONGEST_START_SECONDS))
            await asyncio.to_thread(end, handle)
        else:
            fault = Fault(kill, 1 if kill in RARE else generator.randint(1, MAX_PASSES)) if kill in POINTS else None
            process = await asyncio.to_thread(nursery.start, data_dir, fault, plant)
            async with Client(process.address.target) as client:
                await check_bank(client, data_dir, run.models, run.verdict)
            seconds = None if fault else generator.uniform(0.02, LONGEST_WORK_SECONDS)
            killed: Callable[[], None] = partial(end, process.handle)
            if kill == DATABASE:
                assert kill_database is not None
                killed = kill_database
            if not await work_until_killed(process, run.models, run.verdict, generator, seconds, target, killed):
                raise RuntimeError(f"the bank must come to its fault {kill!r}, it did not in time")
            if kill == DATABASE:
                await _check_goes_on(process, data_dir, run)
            await asyncio.to_thread(end, process.handle)
            await asyncio.to_thread(_check_children, process, run.verdict)
            if target is not None:
                await asyncio.to_thread(check_snapshot, target, run.verdict)
        run.kills[kill] = run.kills.get(kill, 0) + 1
        progress(run)
    process = await asyncio.to_thread(nursery.start, data_dir, None, plant)
    async with Client(process.address.target) as client:
        await check_bank(client, data_dir, run.models, run.verdict)
    return run


async def _check_goes_on(process: Process, data_dir: Path, run: Run) -> None:
    """The same bank answers again, now that its database is back."""
    deadline = time.monotonic() + BACK_SECONDS
    async with Client(process.address.target) as client:
        while True:
            try:
                await client.put("probe", "a probe")  # its own document
                await client.delete("probe")
                break
            except UnavailableError:
                if time.monotonic() > deadline:
                    run.verdict.wrong.append(f"the bank must go on within {BACK_SECONDS} s of its database's return")
                    return
            await asyncio.sleep(0.02)
        await check_bank(client, data_dir, run.models, run.verdict)


def _check_children(process: Process, verdict: Verdict) -> None:
    ended = [has_ended(child, END_SECONDS, is_zombie_enough=True) for child in process.children]
    if not ended or not all(ended):
        verdict.wrong.append("the embedded Redis server must run with its bank and end with it")
