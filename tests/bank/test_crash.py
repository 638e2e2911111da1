"""kill -9 at random moments of a real bank process: nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from bank_service.data_dir import BankAddress, read_address
from bank_service.wire.codec import decode_gradient, encode_gradient, record_digest
from bank_service.wire.errors import BankError, NotFoundError
from tests.bank.client import Client
from tests.bank.hash_encoder import HashEncoder, spec_of

NUM_KILLS = 10
NUM_WRITERS = 4
IDS_PER_WRITER = 6
START_SECONDS = 60
SWEEP_SECONDS = 20  # the sweep runs beside the first calls


@dataclass(slots=True)
class Process:
    """A bank process; ``kill`` ends it without a chance to say goodbye."""

    popen: subprocess.Popen[bytes]
    address: BankAddress
    children: list[psutil.Process]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


def start(data_dir: Path) -> Process:
    with (data_dir.parent / "log").open("ab") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "tests.bank.bank_process", str(data_dir)],
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(FileNotFoundError):
            address = read_address(data_dir)
            if address is not None and f'"pid": {popen.pid}' in (data_dir / "address.json").read_text():
                return Process(popen, address, psutil.Process(popen.pid).children(recursive=True))
        assert popen.poll() is None, (data_dir.parent / "log").read_text()
        assert time.monotonic() < deadline, "the bank did not start"
        time.sleep(0.02)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Those started in the test; ended after it whatever happens."""
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


@dataclass(slots=True)
class Model:
    """What one writer knows: for each id, the states that the bank may be in. None: no such document."""

    states: dict[str, list[str | None]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)  # the last one acknowledged
    num_acknowledged: int = 0


async def write(client: Client, name: str, model: Model, generator: random.Random) -> None:
    """Writes until the bank goes. An operation that was sent and not acknowledged may or may not have happened."""
    while True:
        id = f"{name}-{generator.randrange(IDS_PER_WRITER)}"
        (now,) = model.states.get(id, [None])
        text = None if now is not None and generator.random() < 0.3 else f"{id} says {generator.random()}"
        model.states[id] = [now, text]
        if text is None:
            await client.delete(id)
        else:
            response = await client.put(id, text)
            assert response.version > model.versions.get(id, 0)
            model.versions[id] = response.version
        model.states[id] = [text]
        model.num_acknowledged += 1


async def work_until_killed(process: Process, models: dict[str, Model], generator: random.Random) -> None:
    async with Client(process.address.target) as client:
        writers = [
            asyncio.create_task(write(client, name, model, random.Random(generator.random())))
            for name, model in models.items()
        ]
        await asyncio.sleep(generator.uniform(0.05, 0.8))
        process.kill()
        for result in await asyncio.gather(*writers, return_exceptions=True):
            assert isinstance(result, BankError), result


async def check(client: Client, models: dict[str, Model]) -> None:
    """The bank's state is one that the models allow; then the models know it."""
    alive: dict[str, str] = {}
    for model in models.values():
        for id, states in model.states.items():
            try:
                got = await client.get(id)
                text = got.document.text
                assert got.version >= model.versions.get(id, 0)
                model.versions[id] = got.version
                alive[id] = text
            except NotFoundError:
                text = None
            assert text in states, f"{id} is {text!r}, acknowledged or sent were {states}"
            model.states[id] = [text]
    entries = {entry.id: entry for entry in (await client.list(page_size=1000)).documents}
    assert set(entries) == set(alive)
    ids = sorted(alive)
    records: dict[str, bytes] = {}
    for index in range(0, len(ids), 64):
        records |= dict(await client.fetch([entries[id].gradient_digest for id in ids[index : index + 64]]))
    encoder = HashEncoder()
    for id in ids:
        record = records[entries[id].gradient_digest]
        assert record_digest(record) == entries[id].gradient_digest
        assert record == encode_gradient(encoder.encode([("", alive[id])])[0].values, spec_of(), "int8")
        assert decode_gradient(record, spec_of()).any()
    hits = (await client.query(text="says", top_k=64)).hits
    assert {hit.id: hit.version for hit in hits} == {id: entries[id].version for id in ids}
    stats = await client.stats()
    assert stats.sequence == stats.indexed_sequence and stats.num_documents == len(alive)


@pytest.mark.asyncio
async def test_kill_9_at_random_moments_loses_nothing_acknowledged(data_dir: Path, processes: list[Process]) -> None:
    generator = random.Random(os.environ.get("CRASH_SEED", "2615734"))
    models = {f"writer{number}": Model() for number in range(NUM_WRITERS)}
    for _ in range(NUM_KILLS):
        processes.append(await asyncio.to_thread(start, data_dir))
        async with Client(processes[-1].address.target) as client:
            await check(client, models)
        await work_until_killed(processes[-1], models, generator)
        assert processes[-1].children, "the bank has an embedded Redis server"
        gone, left = await asyncio.to_thread(psutil.wait_procs, processes[-1].children, 10)
        assert not left, "the embedded Redis server must end with a killed bank"
    processes.append(await asyncio.to_thread(start, data_dir))
    async with Client(processes[-1].address.target) as client:
        await check(client, models)
        num_gradients = (await client.stats()).num_gradients
        deadline = time.monotonic() + SWEEP_SECONDS
        while (count := len(list((data_dir / "blobs").glob("??/*")))) != num_gradients:
            assert time.monotonic() < deadline, f"orphans must be swept: {count} blobs, {num_gradients} gradients"
            await asyncio.sleep(0.02)
    acknowledged = sum(model.num_acknowledged for model in models.values())
    assert acknowledged > 10 * NUM_KILLS, "the kills must have come in the middle of work"
    # A clean stop leaves nothing running, and no address.
    processes[-1].popen.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(processes[-1].popen.wait, 20) == 0
    assert not (await asyncio.to_thread(psutil.wait_procs, processes[-1].children, 5))[1]
    assert read_address(data_dir) is None
