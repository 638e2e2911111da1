"""Clients that know several nodes of one bank, while the nodes come, are drained and are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from bank_service.errors import BankError
from bank_service.runtime.data_dir import read_address
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from benchmarks.servers.object_servers import free_ports
from benchmarks.servers.postgres_server import PostgresServer
from regrad_vllm.client import AsyncBank, Bank, Document, Query

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def node(folder: Path, catalog: str, objects: str, port: int = 0) -> AsyncIterator[BankServer]:
    config = BankConfig(data_dir=folder, catalog=catalog, objects=objects, port=port)
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server:
        yield server


def num_queries(server: BankServer) -> float:
    """The queries that a node has answered."""
    labels = {"method": "Query", "code": "OK"}
    return server.metrics.registry.get_sample_value("regrad_bank_calls_total", labels) or 0.0


def together(*targets: str) -> str:
    return f"ipv4:{','.join(targets)}"


@pytest.mark.asyncio
async def test_calls_go_to_all_nodes_in_turn_and_to_those_that_are_left(
    tmp_path: Path, own_server: PostgresServer, objects_url: str
) -> None:
    catalog = own_server.new_schema()
    async with node(tmp_path / "first", catalog, objects_url) as first:
        async with node(tmp_path / "second", catalog, objects_url) as second:
            address = together(first.address.target, second.address.target)
            async with AsyncBank(address, spec=spec_of()) as client:
                async for receipt in client.ingest([Document("d", "an owl")]):
                    assert receipt.sequence == 1
                while not (num_queries(first) and num_queries(second)):  # until both are connected
                    await client.query(Query("an owl"))
                before = num_queries(first), num_queries(second)
                for _ in range(20):
                    (hit,) = (await client.query(Query("an owl", top_k=1))).hits
                    assert hit.id == "d"
                assert (num_queries(first) - before[0], num_queries(second) - before[1]) == (10, 10)
                failed: list[BankError] = []
                stop = asyncio.Event()

                async def ask() -> None:
                    while not stop.is_set():
                        try:
                            await client.query(Query("an owl"))
                        except BankError as error:
                            failed.append(error)

                asking = [asyncio.create_task(ask()) for _ in range(4)]
                await asyncio.sleep(0.2)
                await second.stop()
                before = num_queries(first), 0.0
                await asyncio.sleep(0.5)
                stop.set()
                await asyncio.gather(*asking)
                assert not failed and num_queries(first) > before[0]
        port = first.address.target.rpartition(":")[2]
        for named in (address, f"dns:///localhost:{port}"):
            with Bank(named, spec=spec_of()) as blocking:
                assert await asyncio.to_thread(lambda: blocking.query("an owl").hits[0].id) == "d"
        command = [sys.executable, "-m", "regrad_vllm.cli", "query", "an owl", "--bank", address]
        done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "an owl" in done.stdout


@contextmanager
def process(folder: Path, port: int, catalog: str, objects: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node as a process of its own, that answers."""
    command = [sys.executable, "-m", "tests.bank.bank_process", str(folder), str(port), "0", catalog, objects]
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        yield running
    finally:
        running.kill()
        running.wait()


async def answers(folder: Path, running: subprocess.Popen[bytes]) -> None:
    while read_address(folder) is None:
        assert running.poll() is None
        await asyncio.sleep(0.05)


@pytest.mark.only_test_all
@pytest.mark.timeout(300)
@pytest.mark.asyncio
async def test_a_rolling_restart_loses_no_call_and_a_killed_node_no_acknowledged_document(
    tmp_path: Path, own_server: PostgresServer, objects_url: str
) -> None:
    catalog, ports = own_server.new_schema(), free_ports(2)
    folders = [tmp_path / "first", tmp_path / "second"]
    acknowledged: set[str] = set()
    failed: list[BankError] = []
    stop = asyncio.Event()

    async def write(client: AsyncBank, name: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                async for receipt in client.ingest([Document(f"{name}-{number}", f"{name} says {number}")]):
                    acknowledged.add(receipt.id)
                await client.query(Query(f"{name} says {number}"))
            except BankError as error:
                failed.append(error)

    with ExitStack() as stack:
        nodes = [
            stack.enter_context(process(folder, port, catalog, objects_url))
            for folder, port in zip(folders, ports, strict=True)
        ]
        for folder, running in zip(folders, nodes, strict=True):
            await answers(folder, running)

        async def again(number: int, end: Callable[[subprocess.Popen[bytes]], None]) -> None:
            end(nodes[number])
            assert await asyncio.to_thread(nodes[number].wait, 30) is not None
            (folders[number] / "address.json").unlink(missing_ok=True)
            nodes[number] = stack.enter_context(process(folders[number], ports[number], catalog, objects_url))
            await answers(folders[number], nodes[number])
            await asyncio.sleep(1.5)  # clients find it again

        async with AsyncBank(together(*(f"127.0.0.1:{port}" for port in ports)), spec=spec_of()) as client:
            writers = [asyncio.create_task(write(client, name)) for name in ("a", "b", "c")]
            await asyncio.sleep(1)
            for number in (0, 1):
                await again(number, lambda running: running.send_signal(signal.SIGTERM))
            assert not failed, "a drained node loses no call"
            num_before = len(acknowledged)
            await again(0, lambda running: running.kill())
            stop.set()
            await asyncio.gather(*writers)
        assert len(acknowledged) > num_before > 20
        async with Client(f"127.0.0.1:{ports[1]}") as direct:
            listed, page = set(), ""
            while True:
                answer = await direct.list(page_size=1000, page_token=page)
                listed |= {entry.id for entry in answer.documents}
                if not (page := answer.next_page_token):
                    break
            assert acknowledged <= listed
