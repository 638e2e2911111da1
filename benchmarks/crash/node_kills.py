"""The loop of a crash test with several nodes on one catalog and one object store.

Each client sends one call to each node in turn. After a kill the nodes that are left answer for all promises. Then the
killed node starts again and answers for them, too.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.testing.client import Client
from bank_service.wire.errors import UnavailableError
from benchmarks.crash.clients import clients_of, ended, killed_at
from benchmarks.crash.expected import Model, Verdict
from benchmarks.crash.faults import NODE_POINTS, UPKEEP_POINTS, Fault
from benchmarks.crash.killable import Nursery, Process, end
from benchmarks.crash.kills import (
    LONGEST_START_SECONDS,
    LONGEST_WORK_SECONDS,
    MAX_PASSES,
    NUM_WRITERS,
    START,
    WORK,
    Run,
)
from benchmarks.crash.promises import check


@dataclass(frozen=True, slots=True)
class NodeKill:
    """A kill of one node."""

    node: int
    when: str  # WORK, START or a point

    def fault(self, generator: random.Random) -> Fault | None:
        """The fault that the node must be started with."""
        if self.when in UPKEEP_POINTS:
            return Fault(self.when)
        return Fault(self.when, generator.randint(1, MAX_PASSES)) if self.when in NODE_POINTS else None


def node_plan(number: int, num_nodes: int, generator: random.Random) -> list[NodeKill]:
    """Kills in random order. Of ten, six are at points, one is during a start, and three are at random moments.

    Only the node with the upkeep comes to some points. With two nodes it is the one that was not killed last.
    """
    points = [*NODE_POINTS, *UPKEEP_POINTS]
    kills = (points * (number // len(points) + 1))[: number * 6 // 10]
    kills += [START] * (number // 10)
    kills += [WORK] * (number - len(kills))
    generator.shuffle(kills)
    planned: list[NodeKill] = []
    oldest = list(range(num_nodes))  # in the order of their last start
    for kill in kills:
        node = oldest[0] if kill in UPKEEP_POINTS else generator.choice(oldest)
        oldest = [*(other for other in oldest if other != node), node]
        planned.append(NodeKill(node, kill))
    return planned


class InTurn:
    """A client that sends each call to another node. Only the node that is killed may fail."""

    def __init__(self, clients: Sequence[Client], killed: int, verdict: Verdict) -> None:
        self._clients = clients
        self._killed = killed
        self._verdict = verdict
        self._numbers = itertools.cycle(range(len(clients)))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            number = next(self._numbers)
            try:
                return await getattr(self._clients[number], name)(*args, **kwargs)
            except UnavailableError as error:
                if number != self._killed:
                    self._verdict.wrong.append(f"a node that was not killed refused a call: {error}")
                raise

        return call


async def kill_nodes(
    nursery: Nursery,
    folder: Path,
    kills: Sequence[NodeKill],
    generator: random.Random,
    progress: Callable[[Run], None] = lambda _: None,
    num_nodes: int = 2,
) -> Run:
    """Does all kills, with checks after each."""
    run = Run({f"writer{number}": Model() for number in range(NUM_WRITERS)})
    assert nursery.objects is not None
    objects = RemoteObjects.at(nursery.objects)
    count_blobs = partial(_count, objects)

    def start(node: int, done: int) -> Process:
        following = next((kill for kill in kills[done:] if kill.node == node), None)
        return nursery.start(folder / str(node), following and following.fault(generator))

    async def checked(target: str) -> None:
        async with Client(target) as client:
            # A transaction of its own: the last one of a killed node is over before it.
            await client.put("probe", f"a probe {generator.random()}")
            await client.delete("probe")
            await check(client, count_blobs, run.models, run.verdict)

    nodes = [await asyncio.to_thread(start, node, 0) for node in range(num_nodes)]
    for number, kill in enumerate(kills, 1):
        victim = nodes[kill.node]
        if kill.when == START:
            await asyncio.to_thread(end, victim.handle)
            handle = await asyncio.to_thread(nursery.fork, folder / str(kill.node))
            await asyncio.sleep(generator.uniform(0, LONGEST_START_SECONDS))
            await asyncio.to_thread(end, handle)
        else:
            seconds = generator.uniform(0.02, LONGEST_WORK_SECONDS) if kill.when == WORK else None
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(Client(node.address.target)) for node in nodes]
                turns = cast(Client, InTurn(clients, kill.node, run.verdict))
                tasks = clients_of(turns, run.models, run.verdict, generator)
                died = await killed_at(victim, seconds, partial(end, victim.handle))
                await ended(tasks, run.verdict)
            if not died:
                raise RuntimeError(f"a node must come to its fault {kill.when!r}, it did not in time")
        left = [node for node in nodes if node is not victim]
        await checked(generator.choice(left).address.target)
        nodes[kill.node] = await asyncio.to_thread(start, kill.node, number)
        await checked(nodes[kill.node].address.target)
        run.kills[kill.when] = run.kills.get(kill.when, 0) + 1
        progress(run)
    return run


def _count(objects: RemoteObjects) -> int:
    return sum("/" in name for name in objects.list())
