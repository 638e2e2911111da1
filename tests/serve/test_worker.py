"""Composing in the worker, without an engine: recipe in, vLLM's tensors out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
from regrad_vllm.serve.recipe import Recipe, RecipeError
from regrad_vllm.serve.settings import SettingsError
from regrad_vllm.serve.worker import Composer, gradient_spec, register
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

    spec = gradient_spec(learner)
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
