"""Two nodes as processes of their own: their database restarts or is full, one is frozen or has a wrong clock."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bank_service.blobs.blob_store import name_of
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import BankError, NotFoundError, UnavailableError
from bank_service.testing.client import Client
from benchmarks.crash.expected import is_right
from benchmarks.crash.killable import Nursery, Process
from benchmarks.servers.postgres_server import PostgresServer
from tests.bank.postgres_server import started
from tests.bank.records.test_fetch import whole
from tests.bank.test_object_store import gone

pytestmark = [pytest.mark.only_test_all, pytest.mark.timeout(300)]
DOCUMENTS = 5  # of each writer
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'regrad-bank'"


@pytest.fixture
def few_connections() -> Iterator[PostgresServer]:
    server = started("-c", "max_connections=30", "-c", "superuser_reserved_connections=0")
    yield server
    server.remove()


@dataclass
class Load:
    """Writers and readers at each node. They try again what a node refuses as UNAVAILABLE."""

    clients: list[Client]
    stored: dict[str, tuple[int, str]] = field(default_factory=dict)  # id → version and digest, as acknowledged
    done: list[int] = field(default_factory=lambda: [0, 0])  # rounds of each node
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._work(node, name)) for node in (0, 1) for name in ("a", "b")]
        await self.goes_on()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def goes_on(self, *nodes: int) -> None:
        """Returns when these nodes, or both, have stored and found something new. The test's own limit ends it."""
        for node in nodes or (0, 1):
            wanted = self.done[node] + 4  # rounds that begin from now on are among them
            while self.done[node] < wanted:
                assert not any(task.done() for task in self._tasks), "a call had a wrong answer"
                await asyncio.sleep(0.05)

    async def _work(self, node: int, name: str) -> None:
        client = self.clients[node]
        for number in count():
            if self._stop.is_set():
                return
            id, text = f"{name}{node}-{number % DOCUMENTS}", f"{name}{node} says {number}"
            answer = await tried(lambda id=id, text=text: client.put(id, text))
            assert answer.version > self.stored.get(id, (0, ""))[0]
            self.stored[id] = answer.version, answer.gradient_digest
            hits = (await tried(lambda text=text: client.query(text=text, top_k=64, include_text=True))).hits
            assert text in [hit.text for hit in hits], "what was acknowledged is found"
            self.done[node] += 1


async def tried(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """The answer of a call that is repeated while it is UNAVAILABLE."""
    while True:
        try:
            return await call()
        except UnavailableError:
            await asyncio.sleep(0.05)


async def all_is_there(load: Load, objects: RemoteObjects, *, keeps_past: bool = False) -> None:
    """Each node has what was acknowledged. In the end the store has the gradients of these documents only.

    keeps_past: it has others, too.
    """
    digests: list[str] = []
    for client in load.clients:
        documents = {each.id: each for each in (await client.list(page_size=1000)).documents}
        kept = {id: (each.version, each.gradient_digest) for id, each in documents.items()}
        assert load.stored.items() <= kept.items()
        digests = [each.gradient_digest for each in documents.values()]
        await whole(client, digests)
        hits = (await client.query(text="says", top_k=64, include_text=True, include_gradients=True)).hits
        assert {hit.id for hit in hits} == documents.keys()
        assert all(is_right(hit.gradient_digest, hit.gradient, hit.title, hit.text) for hit in hits)
    while not keeps_past and {name for name in objects.list() if "/" in name} != set(map(name_of, digests)):
        await asyncio.sleep(0.1)


@asynccontextmanager
async def connected(*nodes: Process) -> AsyncIterator[list[Client]]:
    async with Client(nodes[0].address.target) as first, Client(nodes[1].address.target) as second:
        yield [first, second]


@asynccontextmanager
async def two_nodes(folder: Path, catalog: str, objects: str) -> AsyncIterator[tuple[list[Process], list[Client]]]:
    """The nodes, which do the upkeep in this order, and a client of each."""
    with Nursery(folder / "log", catalog, objects) as nursery:
        nodes = [nursery.start(folder / name) for name in ("first", "second")]
        async with connected(*nodes) as clients:
            yield nodes, clients


@pytest.mark.asyncio
async def test_a_database_that_restarts_under_two_nodes_delays_calls_and_loses_nothing_acknowledged(
    tmp_path: Path, own_server: PostgresServer, objects_url: str
) -> None:
    objects = RemoteObjects.at(objects_url)
    async with two_nodes(tmp_path, own_server.new_schema(), objects_url) as (_, clients):
        async with Load(clients) as load:
            for number, away_seconds in ((signal.SIGINT, 0), (signal.SIGQUIT, 0), (signal.SIGINT, 10)):
                await asyncio.to_thread(own_server.stop, number)
                await asyncio.sleep(away_seconds)
                own_server.start()  # in this thread: the server ends with the thread that started it
                await load.goes_on()
        await all_is_there(load, objects)


@pytest.mark.asyncio
async def test_a_database_that_is_out_of_connections_delays_calls_and_loses_nothing_acknowledged(
    tmp_path: Path, few_connections: PostgresServer, objects_url: str
) -> None:
    catalog = few_connections.new_schema()
    async with two_nodes(tmp_path, catalog, objects_url) as (_, clients):
        async with Load(clients) as load:
            for cut in (False, True):  # the nodes keep the connections that they have, or lose them
                failed: list[BaseException] = []
                with ExitStack() as others:
                    taken = [others.enter_context(psycopg.connect(catalog, autocommit=True))]
                    if cut:
                        taken[0].execute(CUT)
                    over = time.monotonic() + 3
                    while time.monotonic() < over:
                        with suppress(psycopg.OperationalError):
                            others.enter_context(psycopg.connect(catalog))
                            continue
                        calls = (client.query(text="says", top_k=64) for client in clients for _ in range(20))
                        answers = await asyncio.gather(*calls, return_exceptions=True)
                        failed += [answer for answer in answers if isinstance(answer, BaseException)]
                assert failed and all(isinstance(error, UnavailableError) for error in failed)
                await load.goes_on()
        await all_is_there(load, RemoteObjects.at(objects_url))
    assert "the catalog can't be read now: connection failed" in (log := (tmp_path / "log").read_text())
    assert "too many clients already" in log


@pytest.mark.asyncio
async def test_a_frozen_node_holds_up_the_other_for_a_while_and_does_no_harm_when_it_wakes(
    tmp_path: Path, own_server: PostgresServer, objects_url: str
) -> None:
    """The first node does the upkeep."""
    objects = RemoteObjects.at(objects_url)
    async with two_nodes(tmp_path, own_server.new_schema(), objects_url) as (nodes, clients):
        first, second = clients
        digests = [(await first.put(f"d{n}", f"d{n} says nothing")).gradient_digest for n in range(3)]
        async with Load(clients) as load:
            await first.delete("d0")
            await first.delete("d1")  # the first node is to remove both in a second
            nodes[0].handle.suspend()
            try:
                assert (await second.query(text="says", top_k=64)).hits, "reads go on at once"
                await load.goes_on(1)
                again = await tried(lambda: second.put("again", "d1 says nothing"))
                assert again.gradient_digest == digests[1]
                await tried(lambda: second.delete("d2"))
                await gone(objects, digests[2])  # so the second node does the upkeep
                await gone(objects, digests[0])
            finally:
                nodes[0].handle.resume()
            await load.goes_on()
        await all_is_there(load, objects)
        await whole(first, [digests[1]])


@pytest.mark.asyncio
@pytest.mark.parametrize("hours", [-2, 2])
async def test_a_node_whose_clock_is_off_loses_nothing_and_answers_nothing_wrong(
    tmp_path: Path, own_server: PostgresServer, objects_url: str, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """It does the upkeep. The history of past versions is ten seconds."""
    package = importlib.util.find_spec("libfaketime")
    if package is None or package.origin is None:
        pytest.skip("libfaketime is not installed: pip install '.[dev]'")
    library = Path(package.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    objects, catalog = RemoteObjects.at(objects_url), own_server.new_schema()
    with ExitStack() as stack:
        with monkeypatch.context() as clock:
            clock.setenv("LD_PRELOAD", str(library))
            clock.setenv("FAKETIME", f"{hours:+d}h")
            clock.setenv("DONT_FAKE_MONOTONIC", "1")
            wrong = stack.enter_context(Nursery(tmp_path / "log", catalog, objects_url))
            nodes = [wrong.start(tmp_path / "first")]
        right = stack.enter_context(Nursery(tmp_path / "log", catalog, objects_url))
        nodes.append(right.start(tmp_path / "second"))
        async with connected(*nodes) as clients:
            first, second = clients
            times = []
            for number, client in enumerate(clients):
                await client.put(f"time-{number}", f"time {number} says nothing")
                times.append((await second.get(f"time-{number}")).updated_at.seconds)
            assert times[0] - times[1] == pytest.approx(hours * 3600, abs=300), "else this test shows nothing"
            async with Load(clients) as load:
                past = []
                for number in range(20):
                    writer, reader = random.Random(number).sample(clients, 2)
                    answer = await writer.put("changed", f"number {number} says nothing")
                    past.append((answer.sequence, f"number {number} says nothing"))
                    (found,) = (await reader.query(document_ids=["changed"], include_text=True)).hits
                    assert (found.text, found.version) == (past[-1][1], answer.version)
                for client in clients:
                    for sequence, text in past:
                        try:
                            answer = await client.query(document_ids=["changed"], as_of=sequence, include_text=True)
                            assert [hit.text for hit in answer.hits] == [text]
                        except BankError as error:
                            assert "as_of must be at least" in error.message, "it may be over, by the clock that is off"
                digest = (await second.put("gone", "gone says nothing")).gradient_digest
                # By a clock that is slow, a deleted document is in the past for two hours more.
                await second.delete("gone", purge=hours < 0)
                seconds = await gone(objects, digest)
                assert hours < 0 or seconds > 0.5, "the grace period is by the database's clock"
                with pytest.raises(NotFoundError):
                    await first.get("gone")
            await all_is_there(load, objects, keeps_past=hours < 0)
