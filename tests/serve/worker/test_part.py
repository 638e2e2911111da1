"""The worker's side of the plugin, without an engine: what it takes for a recipe, when it is on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest

from regrad_vllm.adapt.arena import Arena
from regrad_vllm.learner import Learner
from regrad_vllm.serve.recipe import ADAPTER_ID, Recipe, RecipeError
from regrad_vllm.serve.settings import Settings, SettingsError
from regrad_vllm.serve.worker.part import WorkerPart, register
from regrad_vllm.serve.worker.steps import StepRequests


@pytest.mark.parametrize(
    "path", ["regrad:", "regrad:{", "regrad:[]", 'regrad:{"v":2}', 'regrad:{"v":1}', "/some/folder",
             'regrad:{"v":2,"learner":"","digests":["a"],"weights":[],"gamma":1}',
             'regrad:{"v":2,"learner":"","digests":[],"weights":[],"gamma":Infinity}'],
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


class Runner:
    """A model runner with a manager that has no LoRA layers, which a learner can't be served on."""

    def __init__(self) -> None:
        manager = SimpleNamespace(
            punica_wrapper_mapping={}, modules={}, packed_modules={},
            lora_config=SimpleNamespace(max_lora_rank=16, lora_dtype=torch.float32),
        )  # fmt: skip
        self.lora_manager = SimpleNamespace(_adapter_manager=manager, lora_config=manager.lora_config)


def test_a_worker_has_a_door_and_tells_its_device_about_every_step(
    learner: Learner, learner_folder: Path, arena: Arena
) -> None:
    adopted = WorkerPart(Settings(learner=learner_folder)).adopt(Runner())
    assert adopted.refusal == "" and adopted.door_address.startswith("regrad-")
    adopted.set_step(None)
    request = SimpleNamespace(lora_name="x", lora_path="/theirs")
    known = {"a": request}
    adopted.set_step(StepRequests(["a"], np.array([3]), known.__getitem__, known))
    figures = adopted.figures()
    assert (figures["num_steps"], figures["num_running"], figures["num_admitted"]) == (1, 0, 0)
    assert figures["pool_max_bytes"] == Settings(learner=learner_folder).worker_bytes


def test_a_worker_that_can_not_serve_says_why_and_has_no_door(learner_folder: Path) -> None:
    runner = Runner()
    runner.lora_manager._adapter_manager.lora_config.max_lora_rank = 8
    adopted = WorkerPart(Settings(learner=learner_folder)).adopt(runner)
    assert "--max-lora-rank must be at least" in adopted.refusal and adopted.door_address == ""
    adopted.set_step(None)


def test_vllm_gets_phi_for_our_requests_and_for_no_others(learner: Learner, learner_folder: Path) -> None:
    part, runner = WorkerPart(Settings(learner=learner_folder)), Runner()
    part.adopt(runner)
    recipe = Recipe(learner.fingerprint, (), (), 1.0)
    loaded = part.load(runner.lora_manager, LoRARequest(recipe.name, ADAPTER_ID, recipe.path))
    assert loaded.id == ADAPTER_ID and set(loaded.loras) == set(learner.layout.modules)
    views = {(tensor.module, tensor.part): view for tensor, view in learner.layout.views(learner.phi)}
    for module, weights in loaded.loras.items():
        assert np.array_equal(weights.lora_a.numpy(), views[module, "A"]) and weights.scaling == 1
        assert np.allclose(weights.lora_b.numpy(), views[module, "B"] * learner.scaling)
    with pytest.raises(RecipeError, match="must have the id 2147483647, got 5"):
        part.load(runner.lora_manager, LoRARequest(recipe.name, 5, recipe.path))
    with pytest.raises(RecipeError, match="its recipe's digest"):
        part.load(runner.lora_manager, LoRARequest("mine", ADAPTER_ID, recipe.path))
