"""A worker's composer: real gradients, arena and loops; vLLM's books are the test's."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bank_service.wire.record import (
    GradientFormatError,
    WrongLearnerError,
    decode_gradient,
    encode_gradient,
    record_digest,
)
from regrad_vllm.adapt.arena import Arena, ArenaError
from regrad_vllm.adapt.compose import compose
from regrad_vllm.adapt.document_cache import DocumentCacheFull
from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import Recipe, RecipeError
from tests.serve.support import Worker, random_learner, record_bytes, stored_recipe


def expected(recipe: Recipe, learner: Learner, worker: Worker) -> torch.Tensor:
    """A slot by the formula: summed in float32, B scaled, rounded once, both parts with the rank first."""
    deltas = [decode_gradient((Path(recipe.arena) / digest).read_bytes(), learner.spec) for digest in recipe.digests]
    flat = compose(learner.phi, deltas, recipe.weights, recipe.gamma)
    rows = []
    for tensor, view in learner.layout.views(flat):
        block = view if tensor.part == "A" else (view * np.float32(learner.scaling)).T
        rows.append(np.ascontiguousarray(block).reshape(-1))
    return torch.from_numpy(np.concatenate(rows)).to(worker.memory.memory.dtype)


def prepared(worker: Worker, recipe: Recipe) -> float:
    worker.composer.admit(recipe, "")
    return worker.composer.prepare(recipe.int_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["bf16", "factors-4-1-8", "fp32", "int4", "int8", "lowrank64"])
@pytest.mark.parametrize("num_documents", [0, 1, 3])
def test_a_slot_has_the_formulas_bits(
    arena: Arena, learner: Learner, dtype: torch.dtype, codec: str, num_documents: int
) -> None:
    recipe = stored_recipe(arena, learner, [f"text {number}" for number in range(num_documents)], codec)
    worker = Worker(learner, dtype=dtype)
    assert prepared(worker, recipe) > 0
    slot = worker.composer.activate(recipe)
    assert worker.ids[slot] == recipe.int_id
    assert torch.equal(worker.memory.memory[slot], expected(recipe, learner, worker))
    assert int(worker.memory.memory.any(dim=1).sum()) == 1, "no other slot was touched"


def test_a_request_that_comes_back_is_composed_from_memory(arena: Arena, learner: Learner) -> None:
    recipe = stored_recipe(arena, learner, ["one", "two"])
    worker = Worker(learner)
    prepared(worker, recipe)
    right = expected(recipe, learner, worker)
    worker.composer.activate(recipe)
    worker.ids[worker.ids.index(recipe.int_id)] = None  # preempted, and its slot went to another
    worker.memory.memory.zero_()
    for digest in recipe.digests:
        (arena.folder / digest).unlink()
    assert torch.equal(worker.memory.memory[worker.composer.activate(recipe)], right)
    assert worker.composer.figures()["num_recomposed"] == 1
    worker.composer.release(recipe.int_id)
    assert worker.cache.figures().num_pinned == 0
    worker.ids[worker.ids.index(recipe.int_id)] = None
    worker.composer.activate(recipe)  # still cached, though nobody holds it


def test_an_adapter_that_vllm_puts_out_stays_in_its_slot_while_a_request_needs_it(
    arena: Arena, learner: Learner
) -> None:
    first, second, third = (stored_recipe(arena, learner, [text]) for text in ("one", "two", "three"))
    worker = Worker(learner, max_loras=2, max_waiting=1)
    for recipe in (first, second):
        prepared(worker, recipe)
        worker.composer.activate(recipe)
    slot = worker.ids.index(first.int_id)
    worker.composer.deactivate(first.int_id)  # preempted
    worker.composer.release(second.int_id)
    worker.composer.deactivate(second.int_id)  # over
    assert worker.ids == [None] * 3 and worker.composer.figures()["num_waiting"] == 1
    prepared(worker, third)
    assert worker.composer.activate(third) != slot
    assert worker.composer.activate(first) == slot
    assert worker.composer.figures()["num_recomposed"] == 0
    worker.composer.deactivate(first.int_id)
    worker.composer.release(first.int_id)  # as its client hangs up
    assert worker.composer.figures()["num_waiting"] == 0


def test_what_can_not_be_composed_says_why_and_leaves_nothing(arena: Arena, learner: Learner, model: Path) -> None:
    recipe = stored_recipe(arena, learner, ["one"])
    stranger = random_learner(model, seed=9)
    with pytest.raises(RecipeError, match="worker's learner"):
        Worker(stranger).composer.admit(recipe, "")
    foreign = stored_recipe(arena, stranger, ["one"])
    spec = learner.spec
    huge = encode_gradient(np.full(spec.num_values, 3e37, np.float32), spec, "int8")
    arena.hold().put(record_digest(huge), huge)
    damaged, cut, empty = (stored_recipe(arena, learner, [text]) for text in ("damaged", "cut", "empty"))
    for broken, change in (
        (damaged, lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        (cut, lambda data: data[:-1]),
        (empty, lambda data: b""),
    ):
        path = arena.folder / broken.digests[0]
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(change(data))
    worker = Worker(learner)
    wrong: list[tuple[Recipe, type[Exception], str]] = [
        (replace(foreign, learner=learner.fingerprint), WrongLearnerError, stranger.fingerprint),
        (replace(recipe, digests=("0" * 64,)), ArenaError, "must hold"),
        (damaged, GradientFormatError, "checksum"),
        (cut, GradientFormatError, "bytes"),
        (empty, GradientFormatError, "bytes"),
        (replace(recipe, digests=(record_digest(huge),), gamma=16.0), RecipeError, r"must be finite in torch.float32"),
    ]
    for bad, error, message in wrong:
        with pytest.raises(error, match=message):
            prepared(worker, bad)
        worker.composer.release(bad.int_id)
    figures = worker.composer.figures()
    assert figures["num_tickets"] == figures["num_waiting"] == figures["cache_num_pinned"] == 0
    assert worker.ids == [None] * 6
    half = Worker(learner, dtype=torch.float16)
    too_large = replace(recipe, digests=(record_digest(huge),), gamma=4e-30)  # 1.2e8 is no float16
    with pytest.raises(RecipeError, match="finite in torch.float16"):
        prepared(half, too_large)


def test_an_adapter_waits_for_a_slot_that_nobody_needs(arena: Arena, learner: Learner) -> None:
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(5)]
    worker = Worker(learner, max_loras=2, max_waiting=1)
    for recipe in recipes[:3]:
        prepared(worker, recipe)
    slot = worker.composer.activate(recipes[0])
    late = threading.Thread(target=prepared, args=(worker, recipes[3]))
    late.start()
    late.join(0.2)
    assert late.is_alive() and not worker.slots.is_there(recipes[3].int_id)
    worker.composer.release(recipes[0].int_id)  # its request is over: vLLM still has the adapter, nobody needs it
    late.join(5)
    assert not late.is_alive() and worker.slots.is_there(recipes[3].int_id)
    assert recipes[0].int_id not in worker.ids and not worker.slots.is_there(recipes[0].int_id)
    assert worker.composer.activate(recipes[3]) == slot
    unwanted = threading.Thread(target=prepared, args=(worker, recipes[4]))
    unwanted.start()
    unwanted.join(0.2)
    assert unwanted.is_alive()
    worker.composer.release(recipes[4].int_id)  # its client hung up
    unwanted.join(5)
    assert not unwanted.is_alive()
    for recipe in recipes[1:4]:
        worker.composer.release(recipe.int_id)
    figures = worker.composer.figures()
    assert figures["num_tickets"] == figures["num_waiting"] == figures["cache_num_pinned"] == 0


def test_an_adapter_that_is_needed_again_keeps_its_slot(arena: Arena, learner: Learner) -> None:
    first, second, third = (stored_recipe(arena, learner, [text]) for text in ("one", "two", "three"))
    worker = Worker(learner, max_loras=1, max_waiting=1)
    for recipe in (first, second):
        prepared(worker, recipe)
        worker.composer.activate(recipe)
        worker.composer.release(recipe.int_id)
    worker.composer.admit(first, "")
    assert worker.composer.load(first.int_id)[0] is False
    prepared(worker, third)
    assert first.int_id in worker.ids and second.int_id not in worker.ids


def test_the_step_always_finds_a_slot(arena: Arena, learner: Learner) -> None:
    """Every slot waits for its request, and the step needs one for an adapter that lost its own."""
    recipes = [stored_recipe(arena, learner, [f"text {number}"]) for number in range(4)]
    worker = Worker(learner, max_loras=2, max_waiting=1)
    for recipe in recipes[:3]:
        prepared(worker, recipe)
    right = expected(recipes[3], learner, worker)
    worker.composer.admit(recipes[3], "")
    slot = worker.composer.activate(recipes[3])
    assert torch.equal(worker.memory.memory[slot], right)
    assert [worker.slots.is_there(recipe.int_id) for recipe in recipes] == [True, True, False, True]
    assert worker.composer.activate(recipes[2]) != slot, "composed again when its turn comes"


def test_a_cache_full_of_pinned_gradients_refuses_the_next(arena: Arena, learner: Learner) -> None:
    first, second = (stored_recipe(arena, learner, [text]) for text in ("one", "two"))
    worker = Worker(learner, max_bytes=record_bytes(learner) * 3 // 2)
    prepared(worker, first)
    with pytest.raises(DocumentCacheFull, match="--regrad-worker-bytes"):
        prepared(worker, second)
    worker.composer.release(second.int_id)
    worker.composer.release(first.int_id)
    assert prepared(worker, second) > 0
    assert worker.cache.figures().num_evictions == 1


def test_an_adapter_in_the_running_step_keeps_its_slot_though_its_request_is_over(
    arena: Arena, learner: Learner
) -> None:
    """As at a stop word: the client has its answer, the engine runs the row once more."""
    first, second, third = (stored_recipe(arena, learner, [text]) for text in ("one", "two", "three"))
    worker = Worker(learner, max_loras=1, max_waiting=1)
    prepared(worker, first)
    worker.slots.begin_step(frozenset({first.int_id}))
    slot = worker.composer.activate(first)
    worker.composer.release(first.int_id)
    prepared(worker, second)
    composing = threading.Thread(target=prepared, args=(worker, third))
    composing.start()
    composing.join(0.3)
    assert composing.is_alive() and worker.ids[slot] == first.int_id, "no slot is free"
    assert torch.equal(worker.memory.memory[slot], expected(first, learner, worker))
    worker.slots.begin_step(frozenset({second.int_id}))
    composing.join(10)
    assert not composing.is_alive() and first.int_id not in worker.ids
    assert torch.equal(worker.memory.memory[slot], expected(third, learner, worker))
