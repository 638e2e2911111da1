"""kill -9 of a real bank process: nothing that was acknowledged is lost, and the driver that says so can fail."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bank_service.runtime.data_dir import read_address
from benchmarks.crash.faults import BUGS, POINTS
from benchmarks.crash.killable import ROOT, Nursery
from benchmarks.crash.kills import DATABASE, START, WORK, kill_again_and_again
from benchmarks.crash.node_kills import kill_nodes, node_plan
from tests.bank.postgres_server import started


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("crash") / "log") as running:
        yield running


def generator() -> random.Random:
    return random.Random(os.environ.get("CRASH_SEED", "2615734"))


@pytest.mark.asyncio
async def test_kill_9_at_random_moments_and_chosen_places_loses_nothing_acknowledged(
    data_dir: Path, nursery: Nursery
) -> None:
    kills = [*POINTS, *[WORK, START, WORK] * 2]
    run = await kill_again_and_again(nursery, data_dir, kills, generator())
    assert not run.verdict.lost and not run.verdict.wrong
    assert sum(run.kills.values()) == len(kills)
    assert run.num_acknowledged > 5 * len(kills), "the kills must have come in the middle of work"


@pytest.mark.only_test_all
@pytest.mark.timeout(400)
@pytest.mark.asyncio
async def test_with_the_catalog_in_postgresql_kills_of_either_lose_nothing_acknowledged(
    data_dir: Path, tmp_path: Path
) -> None:
    server = started()
    places = [point for point in POINTS if "snapshot" not in point]  # such a bank takes none

    def kill_database() -> None:
        server.stop(signal.SIGQUIT)
        server.start()

    try:
        with Nursery(tmp_path / "log", server.new_schema()) as nursery:
            kills = [*places, *[WORK, DATABASE, START, DATABASE] * 4]
            run = await kill_again_and_again(nursery, data_dir, kills, generator(), kill_database=kill_database)
    finally:
        server.remove()
    assert not run.verdict.lost and not run.verdict.wrong
    assert run.num_acknowledged > 5 * len(kills), "the kills must have come in the middle of work"


async def killed_nodes(tmp_path: Path, objects_url: str, number: int) -> None:
    server = started()
    try:
        with Nursery(tmp_path / "log", server.new_schema(), objects_url) as nursery:
            kills = node_plan(number, 2, generator())
            run = await kill_nodes(nursery, tmp_path / "nodes", kills, generator())
    finally:
        server.remove()
    assert not run.verdict.lost and not run.verdict.wrong
    assert sum(run.kills.values()) == number
    assert run.num_acknowledged > 5 * number, "the kills must have come in the middle of work"


@pytest.mark.asyncio
async def test_of_two_nodes_one_is_killed_and_the_other_goes_on_with_everything(
    tmp_path: Path, objects_url: str
) -> None:
    await killed_nodes(tmp_path, objects_url, 3)


@pytest.mark.only_test_all
@pytest.mark.timeout(400)
@pytest.mark.asyncio
async def test_of_two_nodes_either_is_killed_in_each_phase_of_a_write_and_of_a_removal(
    tmp_path: Path, seaweed_url: str
) -> None:
    await killed_nodes(tmp_path, seaweed_url, 20)


@pytest.mark.only_test_all
@pytest.mark.asyncio
@pytest.mark.parametrize("bug", BUGS)
async def test_the_driver_finds_a_planted_bug(data_dir: Path, nursery: Nursery, bug: str) -> None:
    random_moments, found = generator(), False
    for number in range(8):  # where the machine has other work, a bank may be killed before it did any
        folder = data_dir / str(number)
        folder.mkdir(parents=True)
        run = await kill_again_and_again(nursery, folder / "bank", [WORK] * 3, random_moments, plant=bug)
        if found := bool(run.verdict.wrong if "neighbour" in bug else run.verdict.lost):
            break
    assert found


def test_a_clean_stop_leaves_nothing_running_and_no_address(data_dir: Path) -> None:
    popen = subprocess.Popen([sys.executable, "-m", "tests.bank.bank_process", str(data_dir)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while read_address(data_dir) is None:
            assert popen.poll() is None and time.monotonic() < deadline, "the bank did not start"
            time.sleep(0.02)
        children = psutil.Process(popen.pid).children(recursive=True)
        assert children, "the bank has an embedded Redis server"
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(20) == 0
    finally:
        popen.kill()
        popen.wait()
    assert not psutil.wait_procs(children, 5)[1]
    assert read_address(data_dir) is None
