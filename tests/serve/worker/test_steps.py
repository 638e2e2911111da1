"""The documents of each step, in every order of admission, preemption, abort and eviction. vLLM's lists are ours."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.door_client import DoorClient
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.kernels.batch import BatchDocuments
from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.seams.worker_patches import StepRequests
from regrad_vllm.serve.worker.admissions import Admissions
from regrad_vllm.serve.worker.device import NoMemory, Resident
from regrad_vllm.serve.worker.pool import Pool, PoolFull
from regrad_vllm.serve.worker.steps import Steps
from tests.serve.support import Worker, record_bytes, stored_recipe
from tests.serve.worker.stepping import Adapter, Engine, adapter, documents


@pytest.fixture
def worker(learner: Learner) -> Worker:
    return Worker(learner)


def addresses(worker: Worker, recipe: Recipe) -> list[int]:
    residents = worker.pool.hold((), recipe.digests)
    worker.pool.let_go(recipe.digests)
    return [resident.address for resident in residents]


def test_each_row_has_its_requests_documents(worker: Worker, learner: Learner, arena: Arena) -> None:
    first = stored_recipe(arena, learner, ["one", "two"])
    second = stored_recipe(arena, learner, ["two", "three", "four"])
    none = Recipe(learner.fingerprint, (), (), 1.0)
    for recipe in (first, second, none):
        worker.admissions.admit(recipe, str(arena.folder))
    engine = Engine(worker, {"a": adapter(first), "b": None, "c": adapter(second), "d": Adapter("x", "/theirs"),
                             "e": adapter(none), "f": adapter(first)})  # fmt: skip
    batch = engine.step(a=3, b=2, c=1, d=1, e=2, f=1)
    assert batch is not None and batch.num_rows == 10
    assert batch.rows.tolist() == [0, 1, 2, 5, 7, 8, 9] and batch.first.tolist() == [0, 2, 4, 6, 9, 9, 9, 11]
    expected = list(zip(addresses(worker, first), np.float32(first.coefficients).tolist(), strict=True))
    assert [documents(batch, row) for row in (0, 2, 9)] == [expected] * 3
    assert [address for address, _ in documents(batch, 5)] == addresses(worker, second)
    assert documents(batch, 3) == documents(batch, 6) == documents(batch, 7) == []
    assert addresses(worker, first)[1] == addresses(worker, second)[0], "a document is there once"
    assert [coefficient for _, coefficient in documents(batch, 5)] == pytest.approx([-0.7, -0.35, -0.7 / 3])


def test_a_table_stays_while_the_batch_does(worker: Worker, learner: Learner, arena: Arena) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    for recipe in (first, second):
        worker.admissions.admit(recipe, str(arena.folder))
    engine = Engine(worker, {"a": adapter(first), "b": adapter(second)})
    for tokens in ({"a": 1, "b": 1}, {"a": 1, "b": 1}, {"b": 1, "a": 1}, {"b": 1, "a": 2}, {"b": 1, "a": 2}):
        engine.step(**tokens)
    assert len(engine.batches) == 3
    worker.steps.clear()
    engine.step(b=1, a=2)
    assert engine.batches[3] is None and len(engine.batches) == 5, "a dummy run came in between"
    engine.known["a"] = adapter(second)  # the id came back with other documents
    assert documents(engine.step(b=1, a=2), 1) == documents(engine.batches[-1], 0)


def test_a_step_of_base_rows_has_no_table(worker: Worker) -> None:
    engine = Engine(worker, {"a": None, "b": Adapter("x", "/theirs")})
    assert engine.step(a=4, b=1) is None


def test_a_last_step_finds_the_documents_that_the_server_let_go(worker: Worker, learner: Learner, arena: Arena) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    worker.admissions.admit(recipe, str(arena.folder))
    engine = Engine(worker, {"a": adapter(recipe)})
    batch = engine.step(a=1)
    worker.admissions.release(recipe)
    assert worker.pool.figures().num_held == 1
    assert documents(engine.step(a=1), 0) == documents(batch, 0)
    engine.known.clear()
    assert worker.steps.figures()["num_running"] == worker.pool.figures().num_held == 0
    assert engine.worker.steps.figures()["num_late"] == 0


def test_a_preempted_request_keeps_its_documents_or_comes_back_to_those_of_the_server(
    learner: Learner, arena: Arena
) -> None:
    recipe, other = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker = Worker(learner, max_bytes=record_bytes(learner))
    worker.admissions.admit(recipe, str(arena.folder))
    engine = Engine(worker, {"a": adapter(recipe), "b": None})
    batch = engine.step(a=1, b=1)
    engine.step(b=1)  # the older runner still knows it
    assert worker.pool.figures().num_held == 1
    assert documents(engine.step(b=1, a=1), 1) == documents(batch, 0)
    del engine.known["a"]
    engine.step(b=1)  # the newer runner forgets it
    assert worker.pool.figures().num_held == 1, "the server's hold"
    with pytest.raises(PoolFull):
        worker.admissions.admit(other, str(arena.folder))
    engine.known["a"] = adapter(recipe)
    assert documents(engine.step(a=5, b=1), 4) == documents(batch, 0)


def test_a_document_that_was_evicted_between_admission_and_step_is_loaded_in_the_step(
    learner: Learner, arena: Arena
) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker = Worker(learner, max_bytes=record_bytes(learner))
    worker.admissions.admit(first, str(arena.folder))
    worker.admissions.release(first)  # the server's connection broke
    worker.admissions.admit(second, str(arena.folder))
    engine = Engine(worker, {"a": adapter(first), "b": adapter(second)})
    batch = engine.step(a=1, b=1)
    assert len(documents(batch, 0)) == len(documents(batch, 1)) == 1
    figures = worker.steps.figures()
    assert (figures["num_late"], figures["num_lost"]) == (1, 0)
    assert worker.pool.figures().used_bytes == 2 * record_bytes(learner), "a step goes beyond the budget"
    engine.known.clear()
    worker.steps.forget()
    assert worker.pool.figures().used_bytes == record_bytes(learner)


def test_a_document_that_is_nowhere_costs_its_own_request_and_no_other(
    worker: Worker, learner: Learner, arena: Arena, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker.admissions.admit(second, str(arena.folder))
    (Path(arena.folder) / first.digests[0]).unlink()
    engine = Engine(worker, {"a": adapter(first), "b": adapter(second), "c": Adapter("regrad-x", "regrad:{")})
    with caplog.at_level(logging.ERROR):
        batch = engine.step(a=1, b=1, c=1)
    assert batch is not None and batch.first.tolist() == [0, 0, 1, 1]
    assert worker.steps.figures()["num_lost"] == 2 and f"adapter {first.name} runs without" in caplog.text
    engine.known.clear()
    worker.steps.forget()
    assert worker.pool.figures().num_held == 1


def test_late_and_lost_requests_reach_the_servers_metrics(worker: Worker, learner: Learner, arena: Arena) -> None:
    first, second, lost = (stored_recipe(arena, learner, [text]) for text in ("one", "two", "three"))
    (arena.folder / lost.digests[0]).unlink()
    worker.admissions.admit(first, str(arena.folder))
    Engine(worker, {id: adapter(recipe) for id, recipe in (("a", second), ("b", lost))}).step(a=1, b=1)

    async def figures() -> dict[str, int]:
        client = DoorClient(worker.door.address)
        answer = await client.hold(client.new_question(), first, str(arena.folder), "")
        await client.close()
        return dict(answer["pool"])

    registry = CollectorRegistry()
    Metrics.create(registry).observe_worker("0/0", asyncio.run(figures()))
    for name in ("regrad_worker_late", "regrad_worker_lost"):
        assert registry.get_sample_value(name, {"worker": "0/0"}) == 1, name


def test_a_device_without_memory_costs_one_request(
    worker: Worker, learner: Learner, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker.admissions.admit(first, str(arena.folder))

    def load(arena: str, digest: str) -> Resident:
        raise NoMemory("full")

    monkeypatch.setattr(worker.device, "load", load)
    engine = Engine(worker, {"a": adapter(first), "b": adapter(second)})
    assert len(documents(engine.step(a=1, b=1), 0)) == 1
    assert worker.steps.figures()["num_lost"] == 1


def test_a_full_pool_gets_back_what_the_runner_forgot_after_its_last_step(learner: Learner, arena: Arena) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker = Worker(learner, max_bytes=record_bytes(learner))
    engine = Engine(worker, {"a": adapter(first)})
    worker.admissions.admit(first, str(arena.folder))
    engine.step(a=1)
    worker.admissions.release(first)
    with pytest.raises(PoolFull):
        worker.admissions.admit(second, str(arena.folder))
    engine.known.clear()  # the engine is idle, so no step follows
    worker.admissions.admit(second, str(arena.folder))


def test_an_update_gives_new_requests_the_new_version_and_running_ones_keep_theirs(
    worker: Worker, learner: Learner, arena: Arena
) -> None:
    old, new = (stored_recipe(arena, learner, [text]) for text in ("the harbour was built in 1901", "in 1902"))
    for recipe in (old, new):
        worker.admissions.admit(recipe, str(arena.folder))
    engine = Engine(worker, {"a": adapter(old)})
    before = documents(engine.step(a=1), 0)
    os.unlink(Path(arena.folder) / old.digests[0])  # the arena has dropped the old version
    engine.known["b"] = adapter(new)
    batch = engine.step(a=1, b=1)
    assert documents(batch, 0) == before != documents(batch, 1)


class Memory:
    """A device whose documents have numbers as addresses. A forgotten one is noticed by who still uses it."""

    refusal = ""
    max_documents = 10**9

    def __init__(self) -> None:
        self.there: dict[int, str] = {}
        self.batch: BatchDocuments | None = None
        self._next = 0
        self._lock = threading.Lock()

    def load(self, arena: str, digest: str) -> Resident:
        with self._lock:
            self._next += 1
            self.there[self._next] = digest
            return Resident(self._next, 0, 1, digest)

    def forget(self, resident: Resident) -> None:
        with self._lock:
            del self.there[resident.address]

    def set_batch(self, batch: BatchDocuments | None) -> None:
        self.batch = batch


class Runner(threading.Thread):
    """vLLM's model runner: some of its requests in each step. It forgets them when they end."""

    def __init__(self, steps: Steps, device: Memory) -> None:
        super().__init__()
        self.waiting: list[tuple[str, Recipe, threading.Event]] = []
        self.over = threading.Event()
        self.failures: list[str] = []
        self._steps, self._device = steps, device
        self._known: dict[str, Adapter | None] = {}
        self._running: dict[str, tuple[Recipe, threading.Event]] = {}
        self._chance = random.Random(8)

    def run(self) -> None:
        while not self.over.is_set():
            self._step()
            time.sleep(0.0005)
        self._known.clear()

    def _step(self) -> None:
        while self.waiting:
            id, recipe, done = self.waiting.pop(0)
            self._running[id], self._known[id] = (recipe, done), adapter(recipe)
        for id in [id for id in self._running if self._chance.random() < 0.1]:
            self._running.pop(id)[1].set()
            del self._known[id]
        ids = [id for id in self._running if self._chance.random() < 0.8]  # the others are preempted
        tokens = np.array([self._chance.choice((1, 1, 5)) for _ in ids], np.int64)
        self._steps.set(StepRequests(ids, tokens, self._known.__getitem__, self._known))
        self.failures += wrong(self._device, [self._running[id][0] for id in ids], tokens)


class Clients:
    """API servers: each request is admitted, asked for or not, and released when the engine is done with it."""

    def __init__(self, admissions: Admissions, runner: Runner, recipes: Sequence[Recipe]) -> None:
        self._admissions, self._runner, self._recipes = admissions, runner, recipes
        self._turns = threading.Semaphore(16)

    def ask(self, number: int) -> None:
        draw = random.Random(number)
        with self._turns:
            recipe = draw.choice(self._recipes)
            try:
                self._admissions.admit(recipe, "arena")
            except PoolFull:
                return
            if draw.random() < 0.8:  # the others hang up before the engine gets the request
                done = threading.Event()
                self._runner.waiting.append((f"r{number}", recipe, done))
                done.wait(60)
            self._admissions.release(recipe)


def test_no_step_ever_reads_a_document_that_is_gone_or_anothers() -> None:
    """300 requests, sixteen at a time, room for 24 of 40 documents: admitted, preempted, hung up in every phase."""
    device, chance = Memory(), random.Random(7)
    pool = Pool(device, 24)
    admissions = Admissions("f" * 64, pool)
    steps = Steps(admissions, pool, device)
    runner = Runner(steps, device)
    clients = Clients(admissions, runner, [made(chance) for _ in range(60)])
    threads = [threading.Thread(target=clients.ask, args=(number,)) for number in range(300)]
    for thread in (runner, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    runner.over.set()
    runner.join(60)
    steps.forget()
    assert not runner.failures, runner.failures[:3]
    figures = pool.figures()
    assert figures.num_held == 0 and figures.num_evictions > 10 and len(admissions) == 0
    assert steps.figures()["num_late"] == 0


def made(chance: random.Random) -> Recipe:
    digests = chance.sample([f"{number:064x}" for number in range(40)], chance.randint(0, 3))
    return Recipe("f" * 64, tuple(digests), (1.0,) * len(digests), chance.random())


def wrong(device: Memory, recipes: Sequence[Recipe], tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[str]:
    """What a step's table gets wrong."""
    batch, row, failures = device.batch, 0, []
    for recipe, count in zip(recipes, tokens.tolist(), strict=True):
        for _ in range(count):
            found = [device.there.get(address) for address, _ in documents(batch, row)]
            if found != list(recipe.digests):
                failures.append(f"row {row} has {found}, not {recipe.digests}")
            row += 1
    if batch is not None and batch.num_rows != row:
        failures.append(f"{batch.num_rows} rows, not {row}")
    return failures


def test_a_step_of_64_requests_takes_less_than_a_tenth_of_a_millisecond(
    worker: Worker, learner: Learner, arena: Arena
) -> None:
    recipes = [stored_recipe(arena, learner, [f"text {number}", "shared"]) for number in range(64)]
    engine = Engine(worker, {f"r{number}": adapter(recipe) for number, recipe in enumerate(recipes)})
    for recipe in recipes:
        worker.admissions.admit(recipe, str(arena.folder))
    ids = dict.fromkeys(engine.known, 1)
    engine.step(**ids)
    taken = []
    for _ in range(200):
        start = time.perf_counter()
        engine.step(**ids)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 1e-4, "decoding: the batch is the same"
