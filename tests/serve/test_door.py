"""A worker's door: real sockets and composer."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from regrad_vllm.adapt.arena import Arena
from regrad_vllm.learner import Learner
from regrad_vllm.serve import endpoint
from regrad_vllm.serve.door_client import DoorClient, DoorClosed
from regrad_vllm.serve.engine import Engine
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.settings import SettingsError
from tests.serve.support import Worker, stored_recipe


def test_the_door_answers_many_at_a_time_and_makes_up_for_a_server_that_is_gone(arena: Arena, learner: Learner) -> None:
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(3)]
    worker = Worker(learner, max_loras=4, max_waiting=2)

    async def run() -> None:
        client, other = DoorClient(worker.door.address), DoorClient(worker.door.address)
        first = client.new_question()
        answers = await asyncio.gather(client.prepare(first, recipes[0], ""), ask(other, recipes[0]))
        assert [answer["error"] for answer in answers] == ["", ""]
        assert worker.composer.figures()["num_composed"] == 1, "once for both"
        await ask(other, recipes[1])
        number = other.new_question()
        cancelled = asyncio.create_task(other.prepare(number, recipes[2], ""))  # no slot is free for it
        await asyncio.sleep(0.05)
        cancelled.cancel()
        other.release(number)
        bad = client.new_question()
        answer = await client.prepare(bad, replace(recipes[0], digests=("0" * 64,)), "")
        assert "must hold gradient" in answer["error"] and answer["damaged"]
        client.release(bad)
        wrong = client.new_question()
        answer = await client.prepare(wrong, replace(recipes[0], learner="f" * 64), "")
        assert "worker's learner" in answer["error"] and not answer["damaged"]
        client.release(wrong)
        client.release(client.new_question())  # never asked: takes nobody's hold
        assert await settled(lambda: worker.composer.figures()["num_tickets"] == 2)
        await other.close()
        assert await settled(lambda: worker.composer.figures()["num_tickets"] == 1)
        assert worker.slots.is_there(recipes[0].int_id) and not worker.slots.is_there(recipes[1].int_id)
        client.release(first)
        assert await settled(lambda: worker.composer.figures()["cache_num_pinned"] == 0)
        await client.close()

    asyncio.run(run())


async def ask(client: DoorClient, recipe: Recipe) -> dict[str, Any]:
    return await client.prepare(client.new_question(), recipe, "")


async def settled(holds: Callable[[], bool]) -> bool:
    for _ in range(500):
        if holds():
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize(
    "line", [b"{\n", b"[]\n", b'{"op":"prepare"}\n', b'{"op":"release"}\n', b'{"id":1,"op":"prepare"}\n', b"x" * 2**21]
)
def test_a_question_that_breaks_the_protocol_ends_its_connection_alone(
    arena: Arena, learner: Learner, line: bytes
) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.settimeout(10)
        rude.connect("\0" + worker.door.address)
        question: dict[str, Any] = {"id": 1, "op": "prepare", "path": recipe.path, "traceparent": ""}
        rude.sendall(json.dumps(question).encode() + b"\n")
        assert json.loads(rude.recv(1000))["error"] == ""
        try:
            rude.sendall(line)
            assert rude.recv(1) == b""
        except ConnectionError:  # closed with our bytes unread
            pass
    deadline = time.monotonic() + 5
    while worker.composer.figures()["num_tickets"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.composer.figures()["num_tickets"] == worker.slots.num_waiting == 0

    async def polite() -> None:
        client = DoorClient(worker.door.address)
        assert (await ask(client, recipe))["error"] == ""
        await client.close()

    asyncio.run(polite())


def test_who_needs_no_slot_waits_for_nobody_and_what_waits_pins_nothing(arena: Arena, learner: Learner) -> None:
    first, *others = (stored_recipe(arena, learner, [f"text {number}"]) for number in range(4))
    worker = Worker(learner, max_loras=1, max_waiting=0)

    async def run() -> None:
        client = DoorClient(worker.door.address)
        assert (await ask(client, first))["error"] == ""
        waiting = [asyncio.create_task(ask(client, recipe)) for recipe in others]
        assert await settled(lambda: worker.composer.figures()["num_tickets"] == 4)
        async with asyncio.timeout(5):
            assert (await ask(client, first))["error"] == ""
        assert worker.composer.figures()["cache_num_pinned"] <= 2, "of the slot, and of the one whose turn is next"
        assert not any(task.done() for task in waiting)
        await client.close()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(run())


def test_who_shares_an_adapter_does_not_keep_its_slot_behind_who_waits_for_one(arena: Arena, learner: Learner) -> None:
    first, second, third = (stored_recipe(arena, learner, [f"text {number}"]) for number in range(3))
    worker = Worker(learner, max_loras=1, max_waiting=1)

    async def request(client: DoorClient, recipe: Recipe) -> str:
        number = client.new_question()
        answer = await client.prepare(number, recipe, "")
        client.release(number)
        return str(answer["error"])

    async def run() -> None:
        client = DoorClient(worker.door.address)
        burst = [request(client, recipe) for recipe in (first, second, third, first, second)]
        async with asyncio.timeout(30):
            assert await asyncio.gather(*burst) == [""] * 5
        await client.close()

    asyncio.run(run())


def test_whatever_goes_wrong_is_answered(
    arena: Arena, learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)

    def fails(*args: object) -> None:
        raise OSError(24, "Too many open files")

    async def run() -> None:
        client = DoorClient(worker.door.address)
        monkeypatch.setattr(worker.cache, "hold", fails)
        async with asyncio.timeout(10):
            answer = await ask(client, recipe)
        assert "Too many open files" in answer["error"] and not answer["damaged"]
        monkeypatch.undo()
        assert (await ask(client, recipe))["error"] == ""
        await client.close()

    asyncio.run(run())
    assert "composing adapter" in caplog.text


def test_a_worker_that_is_gone_is_an_error_that_says_so() -> None:
    async def run() -> None:
        with pytest.raises(DoorClosed, match="restart the server"):
            await ask(DoorClient("regrad-nobody"), Recipe("", "0" * 64, (), (), 1.0))

    asyncio.run(run())


class _LateDoor(DoorClient):
    """The other server's questions come first."""

    async def prepare(self, number: int, recipe: Recipe, traceparent: str) -> dict[str, Any]:
        await asyncio.sleep(0.1)
        return await super().prepare(number, recipe, traceparent)


def test_two_servers_never_wait_for_each_others_slots_on_two_workers(arena: Arena, learner: Learner) -> None:
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(8)]
    workers = [Worker(learner, max_loras=1, max_waiting=1) for _ in range(2)]
    one, two = (worker.door.address for worker in workers)

    async def run() -> None:
        servers = [
            Engine(None, [[DoorClient(one), _LateDoor(two)]]),
            Engine(None, [[_LateDoor(one), DoorClient(two)]]),
        ]

        async def request(number: int) -> None:
            engine = servers[number % 2]
            place = engine.place(recipes[number])
            await engine.prepare(place)
            assert all(worker.slots.is_there(place.recipe.int_id) for worker in workers)
            engine.release(place)

        async with asyncio.timeout(30):
            await asyncio.gather(*map(request, range(8)))
        for server in servers:
            await server.close()

    asyncio.run(run())


class _LateEnd:
    """A connection whose end is heard of late."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readline(self) -> bytes:
        line = await self._reader.readline()
        if not line:
            await asyncio.sleep(0.1)
        return line


class _LateToHear(DoorClient):
    async def _read(self, reader: Any, writer: asyncio.StreamWriter) -> None:
        await super()._read(_LateEnd(reader), writer)  # type: ignore[arg-type]


def test_a_connection_that_ended_does_not_fail_the_questions_of_the_next(arena: Arena, learner: Learner) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)

    async def run() -> None:
        client = _LateToHear(worker.door.address)
        await client.open()
        assert client._writer is not None
        client._writer.close()
        for slot in range(len(worker.ids)):
            worker.ids[slot] = -1 - slot  # all in use: the answer takes its time
        asking = asyncio.create_task(ask(client, recipe))
        assert await settled(lambda: worker.composer.figures()["num_tickets"] == 1)
        await asyncio.wait([asking], timeout=0.3)
        assert not asking.done()
        await client.close()
        with pytest.raises(DoorClosed):
            await asking
        with pytest.raises(DoorClosed, match="shutting down"):
            await ask(client, recipe)

    asyncio.run(run())


def test_the_server_closes_its_doors_when_it_ends_and_when_it_can_not_start(learner: Learner) -> None:
    worker = Worker(learner)
    answer = {"error": "", "learner": learner.fingerprint, "modules": learner.layout.modules, "dtype": "float32"}
    there = answer | {"door": worker.door.address}

    class Client:
        def __init__(self, *answers: dict[str, Any]) -> None:
            self.engine_core, self.core_engines = self, [b""]
            self._answers = answers

        async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> list[Any]:
            return list(self._answers)

    async def run() -> None:
        with pytest.raises(SettingsError, match="can't be reached"):  # the other door is closed again, says the fixture
            await Engine.connect(Client(there, answer | {"door": "regrad-nobody"}), learner)
        engine, _ = await Engine.connect(Client(there), learner)
        app = FastAPI()
        app.state.regrad = SimpleNamespace(engine=engine)
        app.include_router(endpoint.routes())
        (door,) = engine._doors[0]
        async with app.router.lifespan_context(app):
            assert door.is_open
        assert not door.is_open

    asyncio.run(run())


def test_a_worker_that_reads_no_more_holds_no_server_up() -> None:
    async def run() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.bind("\0regrad-silent")
            silent.listen()
            client = DoorClient("regrad-silent")
            await client.open()
            for _ in range(100_000):  # more than the socket's buffers hold
                client.release(client.new_question())
            async with asyncio.timeout(10):
                await client.close()

    asyncio.run(run())
