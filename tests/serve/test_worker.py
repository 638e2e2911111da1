"""Composing in the worker, without an engine: recipe in, vLLM's tensors out."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import platforms
from vllm.lora.request import LoRARequest

from bank_service.wire.codec import (
    GradientFormatError,
    WrongLearnerError,
    decode_gradient,
    encode_gradient,
    record_digest,
)
from regrad_vllm.adapt.arena import Arena, ArenaCorrupt, ArenaError
from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_seams
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.settings import SettingsError
from regrad_vllm.serve.worker import Composer, refusal, register
from tests.serve.support import DrawingEncoder, random_learner

ADAPTER_BYTES = 4 * 1_520_640


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path, 2**26)
    yield made
    made.close()


def stored(arena: Arena, learner: Learner, texts: list[str]) -> Recipe:
    """A recipe whose gradients lie in the arena."""
    encoder = DrawingEncoder(learner)
    records = [encode_gradient(item.values, encoder.spec, "bf16") for item in encoder.encode([("", t) for t in texts])]
    lease = arena.lease()
    for record in records:
        lease.put(record_digest(record), record)
    digests = tuple(record_digest(record) for record in records)
    return Recipe(str(arena.folder), learner.fingerprint, digests, (1.0,) * len(digests), 0.5)


def request_of(recipe: Recipe) -> LoRARequest:
    return LoRARequest(recipe.name, recipe.int_id, recipe.path)


def manager(dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepared", [True, False])
def test_an_adapter_is_the_formula_with_the_scaling_folded_once(
    arena: Arena, learner: Learner, dtype: torch.dtype, prepared: bool
) -> None:
    recipe = stored(arena, learner, ["one", "two"])
    composer = Composer(learner, ADAPTER_BYTES)
    if prepared:
        assert composer.prepare(recipe.path, dtype, "") > 0
        assert composer.prepare(recipe.path, dtype, "") == 0
    model = composer.load(manager(dtype), request_of(recipe))
    assert composer.figures()["num_recomposed"] == (0 if prepared else 1)
    assert composer.figures()["prepared_bytes"] == 0

    spec = learner.spec
    deltas = [decode_gradient((arena.folder / digest).read_bytes(), spec) for digest in recipe.digests]
    expected = learner.phi.astype(np.float64) - 0.5 * (deltas[0].astype(np.float64) + deltas[1])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for tensor, view in learner.layout.views(expected):
        weights = model.get_lora(tensor.module)
        assert weights is not None and weights.scaling == 1
        got = weights.lora_a if tensor.part == "A" else weights.lora_b
        scale = 1.0 if tensor.part == "A" else learner.scaling
        assert got.dtype == dtype and tuple(got.shape) == tensor.shape
        np.testing.assert_allclose(got.double().numpy(), scale * view, rtol=tolerance, atol=tolerance)
    assert model.id == recipe.int_id


def test_values_that_leave_the_engines_dtype_are_refused_with_what_to_do(arena: Arena, learner: Learner) -> None:
    spec = learner.spec
    huge = encode_gradient(np.full(spec.num_values, 3e37, np.float32), spec, "int8")
    lease = arena.lease()
    lease.put(record_digest(huge), huge)
    recipe = Recipe(str(arena.folder), learner.fingerprint, (record_digest(huge),), (1.0,), 16.0)
    composer = Composer(learner, ADAPTER_BYTES)
    with pytest.raises(RecipeError, match=rf"must be finite in torch.float32.*{record_digest(huge)}.*regrad.gamma"):
        composer.prepare(recipe.path, torch.float32, "")
    small = replace(recipe, gamma=1e-30)
    composer.prepare(small.path, torch.float32, "")
    half = replace(recipe, gamma=1e-30 * 4)  # 1.2e8 is no float16
    with pytest.raises(RecipeError, match="finite in torch.float16"):
        composer.prepare(half.path, torch.float16, "")
    assert composer.figures()["num_prepared"] == 1


def test_composing_many_documents_holds_one_gradient_at_a_time(arena: Arena, learner: Learner) -> None:
    def peak(num_documents: int) -> int:
        recipe = stored(arena, learner, [f"text {number}" for number in range(num_documents)])
        composer = Composer(learner, ADAPTER_BYTES)
        tracemalloc.start()
        composer.prepare(recipe.path, torch.float32, "")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    one, eight = peak(1), peak(8)
    assert eight < one + ADAPTER_BYTES, f"{eight - one} bytes more for seven documents more"


class WorkerWithSlots:
    """What ``refusal`` reads of a worker: the modules that the manager wraps, with their stacked tensors."""

    def __init__(self, learner: Learner, num_slots: int, num_stacked: int) -> None:
        module = SimpleNamespace(lora_a_stacked=(torch.zeros(num_stacked, 1, 2, 2),), lora_b_stacked=())
        self.manager = SimpleNamespace(
            modules=dict.fromkeys(learner.layout.modules, module),
            packed_modules={},
            lora_slots=num_slots,
            lora_index_to_id=[None] * num_slots,
        )
        self.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=self.manager))


def test_a_worker_on_a_cpu_without_the_spare_slot_is_refused(learner: Learner) -> None:
    assert refusal(WorkerWithSlots(learner, 4, 5), learner) == ""
    assert "spare slot" in refusal(WorkerWithSlots(learner, 4, 4), learner)
    lacking = WorkerWithSlots(learner, 4, 5)
    lacking.manager.modules.pop(learner.layout.modules[0])
    assert "--lora-target-modules" in refusal(lacking, learner)


def test_where_the_kernels_skip_rows_without_adapter_no_spare_slot_is_asked_for(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    worker = WorkerWithSlots(learner, 4, 4)
    assert vllm_seams.spare_slot_is_zero(worker) is None and refusal(worker, learner) == ""


def test_the_same_recipe_gives_the_same_bits(arena: Arena, learner: Learner) -> None:
    recipe = stored(arena, learner, ["one", "two", "three"])
    first, second = (Composer(learner, 0).load(manager(torch.float32), request_of(recipe)) for _ in range(2))
    for module in learner.layout.modules:
        one, two = first.get_lora(module), second.get_lora(module)
        assert one is not None and two is not None
        assert torch.equal(one.lora_a, two.lora_a) and torch.equal(one.lora_b, two.lora_b)


def test_no_more_prepared_adapters_are_kept_than_there_is_room(arena: Arena, learner: Learner) -> None:
    composer = Composer(learner, 2 * ADAPTER_BYTES)
    recipes = [stored(arena, learner, [text]) for text in ("a", "b", "c")]
    for recipe in recipes:
        composer.prepare(recipe.path, torch.float32, "")
    assert composer.figures()["num_prepared"] == 2
    for recipe in recipes:  # in the scheduler's order: only the last must be composed again
        composer.load(manager(torch.float32), request_of(recipe))
    assert (composer.figures()["num_composed"], composer.figures()["num_recomposed"]) == (4, 1)
    composer.prepare(recipes[0].path, torch.float32, "")
    composer.forget(recipes[0].int_id)
    composer.forget(recipes[0].int_id)
    assert composer.figures()["prepared_bytes"] == composer.figures()["num_prepared"] == 0


def test_a_recipe_that_can_not_be_composed_says_why(arena: Arena, learner: Learner, model: Path) -> None:
    recipe = stored(arena, learner, ["one"])
    composer = Composer(learner, ADAPTER_BYTES)
    stranger = random_learner(model, seed=9)
    with pytest.raises(RecipeError, match="worker's learner"):
        Composer(stranger, 0).prepare(recipe.path, torch.float32, "")
    foreign = stored(arena, stranger, ["one"])
    disguised = Recipe(foreign.arena, learner.fingerprint, foreign.digests, (1.0,), 1.0)
    with pytest.raises(WrongLearnerError, match=stranger.fingerprint):
        composer.prepare(disguised.path, torch.float32, "")
    with pytest.raises(ArenaError, match="must hold"):
        composer.prepare(Recipe(recipe.arena, recipe.learner, ("0" * 64,), (1.0,), 1.0).path, torch.float32, "")
    path = arena.folder / recipe.digests[0]
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises((ArenaCorrupt, GradientFormatError)):
        composer.prepare(recipe.path, torch.float32, "")
    assert composer.figures()["num_prepared"] == 0


def test_a_name_that_is_not_its_recipes_is_refused(arena: Arena, learner: Learner) -> None:
    recipe = stored(arena, learner, ["one"])
    with pytest.raises(RecipeError, match="must be its recipe's digest"):
        Composer(learner, 0).load(manager(torch.float32), LoRARequest("regrad-other", 5, recipe.path))


@pytest.mark.parametrize(
    "path", ["regrad:", "regrad:{", "regrad:[]", 'regrad:{"v":2}', 'regrad:{"v":1}', "/some/folder",
             'regrad:{"v":1,"arena":"","learner":"","digests":["a"],"weights":[],"gamma":1}',
             'regrad:{"v":1,"arena":"","learner":"","digests":[],"weights":[],"gamma":Infinity}'],
)  # fmt: skip
def test_a_path_that_is_no_recipe_is_refused(path: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(path)


def test_register_does_nothing_without_a_learner_and_refuses_a_half_enabled_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("REGRAD_LEARNER", raising=False)
    register()
    monkeypatch.setenv("REGRAD_LEARNER", "/nowhere")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(SettingsError, match="VLLM_PLUGINS must name regrad"):
        register()
