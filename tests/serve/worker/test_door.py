"""A worker's door: real sockets, pool and arena."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from bank_service.wire.record import DEFAULT_CODEC, encode_gradient, record_digest
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api import endpoint
from regrad_vllm.serve.api.door_client import DoorClient, DoorClosed
from regrad_vllm.serve.api.engine import Engine, ResidentError
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.arena.record_files import ArenaError
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.settings import SettingsError
from regrad_vllm.serve.worker.device import Resident
from tests.serve.support import Worker, record_bytes, stored_recipe


def test_the_door_answers_many_at_a_time_and_makes_up_for_a_server_that_is_gone(arena: Arena, learner: Learner) -> None:
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(2)]
    folder = str(arena.folder)
    worker = Worker(learner)

    async def run() -> None:
        client, other = DoorClient(worker.door.address), DoorClient(worker.door.address)
        first = client.new_question()
        answers = await asyncio.gather(
            client.hold(first, recipes[0], folder, ""), ask(other, recipes[0], arena), ask(other, recipes[1], arena)
        )
        assert [answer["error"] for answer in answers] == ["", "", ""]
        assert answers[0]["pool"]["num_documents"] >= 1
        bad = client.new_question()
        answer = await client.hold(bad, replace(recipes[0], digests=("0" * 64,)), folder, "")
        assert "must hold gradient" in answer["error"] and answer["damaged"]
        client.release(bad)
        wrong = client.new_question()
        answer = await client.hold(wrong, replace(recipes[0], learner="f" * 64), folder, "")
        assert "worker's learner" in answer["error"] and not answer["damaged"]
        client.release(wrong)
        client.release(client.new_question())  # never asked: takes nobody's hold
        assert await settled(lambda: len(worker.admissions) == 3)
        await other.close()
        assert await settled(lambda: len(worker.admissions) == 1)
        assert worker.pool.figures().num_held == 1
        client.release(first)
        assert await settled(lambda: worker.pool.figures().num_held == 0)
        await client.close()

    asyncio.run(run())


def test_only_a_record_that_the_bank_can_send_anew_counts_as_damaged(arena: Arena, learner: Learner) -> None:
    damaged, odd = (stored_recipe(arena, learner, [text]) for text in ("damaged", "odd"))
    other = replace(learner.spec, fingerprint="e" * 64)
    record = encode_gradient(np.ones(learner.layout.num_values, np.float32), other, DEFAULT_CODEC)
    arena.hold().put(record_digest(record), record)
    path = arena.folder / damaged.digests[0]
    path.chmod(0o600)
    path.write_bytes(record)
    (arena.folder / odd.digests[0]).unlink()
    (arena.folder / odd.digests[0]).mkdir()
    worker = Worker(learner)

    async def run() -> None:
        client = DoorClient(worker.door.address)
        for recipe, is_damaged, reason in (
            (damaged, True, "must have that SHA-256"),
            (odd, False, "can't be mapped"),
            (replace(odd, digests=(record_digest(record),)), False, "must be of learner"),
        ):
            answer = await ask(client, recipe, arena)
            assert reason in answer["error"] and answer["damaged"] is is_damaged
        await client.close()

    asyncio.run(run())


def test_a_full_pool_is_one_requests_error_that_says_what_to_raise(arena: Arena, learner: Learner) -> None:
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(2)]
    worker = Worker(learner, max_bytes=record_bytes(learner))

    async def run() -> None:
        client = DoorClient(worker.door.address)
        first, second = client.new_question(), client.new_question()
        assert (await client.hold(first, recipes[0], str(arena.folder), ""))["error"] == ""
        answer = await client.hold(second, recipes[1], str(arena.folder), "")
        assert "raise --regrad-worker-bytes" in answer["error"] and not answer["damaged"]
        client.release(first)
        client.release(second)
        assert (await ask(client, recipes[1], arena))["error"] == ""
        await client.close()

    asyncio.run(run())


def test_a_release_that_comes_while_documents_are_loaded_ends_the_hold(
    arena: Arena, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = (stored_recipe(arena, learner, [text]) for text in ("slow", "fast"))
    worker = Worker(learner)
    worker.admissions.admit(fast, str(arena.folder))
    begun, go_on = threading.Event(), threading.Event()
    load = worker.device.load

    def waits(arena: str, digest: str) -> Resident:
        begun.set()
        assert go_on.wait(10)
        return load(arena, digest)

    async def run() -> None:
        client = DoorClient(worker.door.address)
        number = client.new_question()
        cancelled = asyncio.create_task(client.hold(number, slow, str(arena.folder), ""))
        assert await settled(begun.is_set)
        async with asyncio.timeout(5):
            assert (await ask(client, fast, arena))["error"] == "", "resident documents don't wait"
        cancelled.cancel()
        client.release(number)
        await asyncio.sleep(0.05)
        go_on.set()
        assert await settled(lambda: worker.admissions.is_resident(slow) and len(worker.admissions) == 2)
        await client.close()
        assert await settled(lambda: worker.pool.figures().num_held == 1 == len(worker.admissions))

    monkeypatch.setattr(worker.device, "load", waits)
    asyncio.run(run())


async def ask(client: DoorClient, recipe: Recipe, arena: Arena | None = None) -> dict[str, Any]:
    return await client.hold(client.new_question(), recipe, str(arena.folder) if arena else "/nowhere", "")


async def settled(holds: Callable[[], bool]) -> bool:
    for _ in range(500):
        if holds():
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize(
    "line",
    [
        b"{\n",
        b"[]\n",
        b'{"op":"hold"}\n',
        b'{"op":"release"}\n',
        b'{"id":1,"op":"hold"}\n',
        b'{"id":2,"op":"?"}\n',
        b"x" * 2**21,
    ],
)
def test_a_question_that_breaks_the_protocol_ends_its_connection_alone(
    arena: Arena, learner: Learner, line: bytes
) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.settimeout(10)
        rude.connect("\0" + worker.door.address)
        question = {"id": 1, "op": "hold", "path": recipe.path, "arena": str(arena.folder), "traceparent": ""}
        rude.sendall(json.dumps(question).encode() + b"\n")
        assert json.loads(rude.recv(1000))["error"] == ""
        try:
            rude.sendall(line)
            assert rude.recv(1) == b""
        except ConnectionError:  # closed with our bytes unread
            pass
    deadline = time.monotonic() + 5
    while len(worker.admissions) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(worker.admissions) == worker.pool.figures().num_held == 0

    async def polite() -> None:
        client = DoorClient(worker.door.address)
        assert (await ask(client, recipe, arena))["error"] == ""
        await client.close()

    asyncio.run(polite())


def test_whatever_goes_wrong_is_answered(
    arena: Arena, learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)

    def fails(*args: object) -> None:
        raise OSError(24, "Too many open files")

    async def run() -> None:
        client = DoorClient(worker.door.address)
        monkeypatch.setattr(worker.pool, "hold", fails)
        async with asyncio.timeout(10):
            answer = await ask(client, recipe, arena)
        assert "Too many open files" in answer["error"] and not answer["damaged"]
        monkeypatch.undo()
        assert (await ask(client, recipe, arena))["error"] == ""
        await client.close()

    asyncio.run(run())
    assert "at the door failed" in caplog.text


def test_a_worker_that_is_gone_is_an_error_that_says_so() -> None:
    async def run() -> None:
        with pytest.raises(DoorClosed, match="restart the server"):
            await ask(DoorClient("regrad-nobody"), Recipe("0" * 64, (), (), 1.0))

    asyncio.run(run())


def test_all_workers_of_a_rank_are_asked_and_the_first_error_counts(arena: Arena, learner: Learner) -> None:
    recipe, other = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    workers = [Worker(learner), Worker(learner, max_bytes=record_bytes(learner))]

    async def run() -> None:
        engine = Engine(None, [[DoorClient(worker.door.address) for worker in workers]])
        first, second = engine.place(recipe), engine.place(other)
        await engine.prepare(first, str(arena.folder))
        assert all(worker.admissions.is_resident(recipe) for worker in workers)
        with pytest.raises(ResidentError, match="raise --regrad-worker-bytes"):
            await engine.prepare(second, str(arena.folder))
        assert engine.pools["0/1"]["num_held"] == 1
        for placement in (first, second):
            engine.release(placement)
        assert await settled(lambda: not any(len(worker.admissions) for worker in workers))
        await engine.close()

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


def test_a_connection_that_ended_does_not_fail_the_questions_of_the_next(
    arena: Arena, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker = Worker(learner)
    begun, go_on = threading.Event(), threading.Event()

    def waits(arena: str, digest: str) -> Resident:
        begun.set()
        go_on.wait(10)
        raise ArenaError("too late")

    monkeypatch.setattr(worker.device, "load", waits)

    async def run() -> None:
        client = _LateToHear(worker.door.address)
        await client.open()
        assert client._writer is not None
        client._writer.close()
        asking = asyncio.create_task(ask(client, recipe, arena))
        assert await settled(begun.is_set)
        await asyncio.wait([asking], timeout=0.3)
        assert not asking.done()
        await client.close()
        with pytest.raises(DoorClosed):
            await asking
        with pytest.raises(DoorClosed, match="shutting down"):
            await ask(client, recipe)
        go_on.set()

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
            await door.open()
        with pytest.raises(DoorClosed, match="shutting down"):
            await door.open()

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
