"""The engine's steps beside composing: vLLM's worker as far as it gives and takes slots, everything else real."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from regrad_vllm.adapt.arena import Arena
from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import Recipe
from tests.serve.support import Worker, record_bytes, stored_recipe
from tests.serve.test_composer import expected, prepared


def test_a_step_that_puts_out_an_adapter_of_its_own_batch_finds_it_again(arena: Arena, learner: Learner) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker = Worker(learner, max_loras=1, max_waiting=1)
    prepared(worker, first)
    worker.composer.activate(first)
    worker.composer.release(first.int_id)  # over for its client, not in the engine
    prepared(worker, second)
    worker.slots.begin_step(frozenset({first.int_id, second.int_id}))
    worker.composer.deactivate(first.int_id)
    worker.composer.activate(second)
    assert worker.slots.is_there(first.int_id) and worker.slots.num_waiting == 1
    worker.slots.step_is_set_up()
    assert not worker.slots.is_there(first.int_id) and worker.slots.num_waiting == 0, "nobody came for it"


def test_adapters_that_vllm_puts_out_between_steps_leave_their_slots(arena: Arena, learner: Learner) -> None:
    """As vLLM does with the dummies that it profiles with: the step with all of them was the last one."""
    worker = Worker(learner, max_loras=3, max_waiting=1)
    worker.slots.begin_step(frozenset({1, 2, 3}))
    for adapter_id in (1, 2, 3):
        worker.slots.take(adapter_id)
    worker.slots.step_is_set_up()
    for adapter_id in (1, 2, 3):
        worker.composer.deactivate(adapter_id)
    assert worker.slots.num_waiting == 0 and worker.ids == [None] * 4
    for text in ("one", "two", "three", "four"):
        assert prepared(worker, stored_recipe(arena, learner, [text])) > 0


@dataclass
class _Asked:
    """A request in the engine."""

    recipe: Recipe
    over: threading.Event = field(default_factory=threading.Event)


class _Steps(threading.Thread):
    """vLLM's worker: at most three adapters a step, all activated, then computed with."""

    def __init__(self, worker: Worker, right: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.failures: list[str] = []
        self.scheduled: deque[_Asked] = deque()
        self.all_over = threading.Event()
        self._worker = worker
        self._right = right
        self._chance = random.Random(4)

    def run(self) -> None:
        while not self.all_over.is_set():
            if self.scheduled:
                self._step()
            else:
                time.sleep(0.001)

    def _step(self) -> None:
        found = [self.scheduled.popleft() for _ in range(min(len(self.scheduled), 6))]
        recipes = {asked.recipe.int_id: asked.recipe for asked in found[:3]}
        batch = [asked for asked in found if asked.recipe.int_id in recipes]
        self.scheduled.extendleft(asked for asked in found if asked.recipe.int_id not in recipes)
        self._worker.slots.begin_step(frozenset(recipes))
        done: set[int] = set()
        for adapter_id, recipe in recipes.items():
            if adapter_id not in self._worker.ids:
                self._make_room(done)
                self._worker.composer.activate(recipe)
            done.add(adapter_id)
        self._worker.slots.step_is_set_up()
        for asked in batch:
            if self._chance.random() < 0.5:
                asked.over.set()  # its answer ended with the step before: it runs for nothing
        time.sleep(0.002)
        for adapter_id in recipes:
            slot = self._worker.ids.index(adapter_id)
            if not torch.equal(self._worker.memory.memory[slot], self._right[adapter_id]):
                self.failures.append(f"slot {slot} has other values")
        for asked in batch:
            if not asked.over.is_set() and self._chance.random() < 0.2:
                self.scheduled.append(asked)  # preempted, or another token to come
            else:
                asked.over.set()

    def _make_room(self, done: set[int]) -> None:
        """As vLLM does, which may put out one of the same batch whose turn comes later."""
        active = [id for id in self._worker.ids if id is not None]
        if len(active) >= 3:
            self._worker.composer.deactivate(self._chance.choice([id for id in active if id not in done]))


def test_no_step_ever_sees_another_adapters_values(arena: Arena, learner: Learner) -> None:
    """200 requests, eight at a time on five slots: composed, scheduled, preempted, over in the middle of a step."""
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(8)]
    worker = Worker(learner, max_loras=3, max_waiting=2, max_bytes=9 * record_bytes(learner))
    steps = _Steps(worker, {recipe.int_id: expected(recipe, learner, worker) for recipe in recipes})
    turns, composing = threading.Semaphore(8), threading.Lock()

    def serve(asked: _Asked) -> None:
        """In the API server, which releases as soon as it has its answer."""
        with turns:
            adapter_id = asked.recipe.int_id
            worker.composer.admit(asked.recipe, "")
            if not (worker.composer.is_there(adapter_id) and not worker.composer.load(adapter_id)[0]):
                with composing:
                    worker.composer.prepare(adapter_id)
            steps.scheduled.append(asked)
            if not asked.over.wait(60):
                steps.failures.append("a request never ran")
            worker.composer.release(adapter_id)

    chance = random.Random(5)
    threads = [threading.Thread(target=serve, args=(_Asked(chance.choice(recipes)),)) for _ in range(200)]
    for thread in (steps, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    steps.all_over.set()
    steps.join(60)
    assert not steps.is_alive() and not steps.failures, steps.failures[:3]
    figures = worker.composer.figures()
    assert figures["num_tickets"] == figures["num_waiting"] == figures["cache_num_pinned"] == 0
    assert figures["num_composed"] > 8, "slots were given away"
