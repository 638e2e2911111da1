"""The worker's side of the plugin, without an engine: what it takes for a recipe, when it is on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest

from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.kernels.layer_slice import MAX_RANK
from regrad_vllm.serve.recipe import ADAPTER_ID, Recipe, RecipeError
from regrad_vllm.serve.seams.worker_patches import StepRequests, make_lora_model
from regrad_vllm.serve.settings import Settings, SettingsError
from regrad_vllm.serve.worker.part import WorkerPart, register


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
            lora_config=SimpleNamespace(lora_dtype=torch.float32),
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


def test_a_worker_that_can_not_serve_says_why_and_has_no_door(tmp_path: Path) -> None:
    layout = Layout.build(MAX_RANK + 1, [("m", 4, 4)])
    config = LearnerConfig(base_digest="0" * 64, lora_alpha=1.0, step_size_kind="same")
    Learner(config, layout, np.zeros(layout.num_values, np.float32), np.ones(1, np.float32)).save(tmp_path)
    adopted = WorkerPart(Settings(learner=tmp_path)).adopt(Runner())
    assert adopted.refusal == "the learner's rank must be at most 512, got 513; train a learner of a lower rank"
    assert adopted.door_address == ""
    adopted.set_step(None)


def test_vllm_gets_a_tiny_adapter_for_our_requests_and_for_no_others(learner: Learner, learner_folder: Path) -> None:
    part = WorkerPart(Settings(learner=learner_folder))
    part.adopt(Runner())
    recipe = Recipe(learner.fingerprint, (), (), 1.0)
    found = part.learner_of(LoRARequest(recipe.name, ADAPTER_ID, recipe.path))
    loaded = make_lora_model(found, torch.float32)
    (weights,) = loaded.loras.values()
    shapes = learner.layout.shapes
    assert loaded.id == ADAPTER_ID and weights.module_name in learner.layout.modules
    assert (weights.lora_a.shape, weights.lora_b.shape) == ((1, shapes[0][1]), (shapes[1][0], 1))
    with pytest.raises(RecipeError, match="must have the id 2147483647, got 5"):
        part.learner_of(LoRARequest(recipe.name, 5, recipe.path))
    with pytest.raises(RecipeError, match="its recipe's digest"):
        part.learner_of(LoRARequest("mine", ADAPTER_ID, recipe.path))
