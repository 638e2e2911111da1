"""Slots on CPUs, without an engine: vLLM-shaped layers with our memory, and managers that can't have a learner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from regrad_vllm.adapt.loops import lora
from regrad_vllm.learner import Learner
from regrad_vllm.serve import slot_shards, vllm_seams
from regrad_vllm.serve.cpu_slots import CpuSlots
from regrad_vllm.serve.worker.extension import refusal
from tests.serve.test_cpu_kernels import added, merged, wrapper
from tests.serve.test_gpu_slots import INNER, INPUTS, RANK, SLOTS, Layers, layers, manager_of, small_learner, values_of


def cpu_layers(values: torch.dtype, weights: torch.dtype, *, rank: int = RANK) -> Layers:
    """With base layers that compute in ``values``."""
    modules = layers(weights, rank=rank)
    for _, module in modules:
        module.base_layer = SimpleNamespace(params_dtype=values)
    return modules


def worker_manager(modules: Layers, monkeypatch: pytest.MonkeyPatch, *others: str) -> Any:
    """A manager with LoRA on these layers and on ``others``, which are no linear ones."""
    manager = manager_of(modules, monkeypatch)
    monkeypatch.setattr(vllm_seams, "other_layers", lambda manager: list(others))
    names = [name for names, _ in modules for name in names]
    manager.modules, manager.packed_modules = dict.fromkeys([*names, *others]), {}
    return manager


@pytest.mark.parametrize("projections", [("up_proj", "down_proj"), ("gate_proj",)])
def test_a_slice_that_the_learner_does_not_adapt_adds_nothing_and_the_others_all(
    monkeypatch: pytest.MonkeyPatch, projections: tuple[str, ...]
) -> None:
    learner = small_learner(projections)
    modules = cpu_layers(torch.float32, torch.float32)
    manager = worker_manager(modules, monkeypatch)
    assert refusal(manager, learner) == ""
    slots = CpuSlots(manager, learner)
    assert slots.compose(1, [], [])
    phi = {(t.module, t.part): view for t, view in learner.layout.views(learner.phi)}
    for names, module in modules[:-1]:
        for name in names:
            a, b = (values_of(modules, name, part, 1).numpy() for part in ("A", "B"))
            if name.rpartition(".")[2] in projections:
                assert np.array_equal(a, phi[name, "A"])
                assert np.array_equal(b, phi[name, "B"] * np.float32(learner.scaling))
            else:
                assert not a.any() and not b.any()
        outputs = tuple(stack.shape[2] for stack in module.lora_b_stacked)
        rows = [1, -1, 1, 1, 1, 1]
        x, y = torch.randn(len(rows), module.lora_a_stacked[0].shape[3]), torch.zeros(len(rows), sum(outputs))
        wrapper(rows).add_lora_linear(y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, outputs)
        right = added(x, module.lora_a_stacked, module.lora_b_stacked, rows)
        assert right.any() == any(name.rpartition(".")[2] in projections for name in names)
        assert torch.allclose(y.double(), right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
def test_no_step_compiles_a_loop(monkeypatch: pytest.MonkeyPatch, values: torch.dtype, weights: torch.dtype) -> None:
    modules = cpu_layers(values, weights)
    lora._body.cache_clear()
    CpuSlots(manager_of(modules, monkeypatch), small_learner()).warm_up()
    num_compiled = lora._body.cache_info().misses
    module = modules[0][1]
    x, y = torch.ones(1, INPUTS, dtype=values), torch.zeros(1, 2 * INNER, dtype=values)
    wrapper([0]).add_lora_linear(y, x, module.lora_a_stacked, module.lora_b_stacked, 1.0, (INNER, INNER))
    assert lora._body.cache_info().misses == num_compiled


@pytest.mark.parametrize("on_cpu", [True, False])
def test_slots_of_a_rank_below_the_learners_are_refused_by_the_flags_name(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    monkeypatch.setattr(vllm_seams, "is_cpu", lambda: on_cpu)
    manager = worker_manager(cpu_layers(torch.float32, torch.float32, rank=RANK - 1), monkeypatch)
    assert "--max-lora-rank must be at least the learner's rank 4, got 3" in refusal(manager, small_learner())


@pytest.mark.parametrize("on_cpu", [True, False])
def test_layers_of_another_shape_than_the_learners_are_refused(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr(vllm_seams, "is_cpu", lambda: on_cpu)
    modules = cpu_layers(torch.float32, torch.float32)
    (gate_up, down) = modules[0][1], modules[3][1]
    gate_up.lora_b_stacked = (gate_up.lora_b_stacked[0], torch.zeros(SLOTS, 1, INNER + 8, RANK))
    learner = small_learner()
    refused = refusal(worker_manager(modules, monkeypatch), learner)
    right = f"the learner's {INPUTS} inputs and {INNER} outputs on this worker, got {INPUTS} and {INNER + 8}; serve"
    assert f"layers.1.mlp.up_proj must have {right}" in refused
    gate_up.lora_b_stacked = gate_up.lora_b_stacked[:1] * 2
    down.lora_a_stacked = (torch.zeros(SLOTS, 1, RANK, INNER - 8),)
    refused = refusal(worker_manager(modules, monkeypatch), learner)
    right = f"the learner's {INNER} inputs and {INPUTS} outputs on this worker, got {INNER - 8} and {INPUTS}; serve"
    assert f"layers.2.mlp.down_proj must have {right}" in refused


def test_a_learners_module_that_is_no_linear_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    learner: Learner = small_learner()
    modules = cpu_layers(torch.float32, torch.float32)
    experts = modules.pop(1)[0][0]
    refused = slot_shards.refusal(worker_manager(modules, monkeypatch, experts), learner.layout)
    assert f"the learner's modules must be linear layers, {experts} is none" in refused


def test_a_layer_that_cuts_the_learners_tensors_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = small_learner()
    modules = cpu_layers(torch.float32, torch.float32)
    vars(modules[0][1]).update(vars(merged(1, 2, [2 * INNER, 2 * INNER])))  # a worker's second half, beyond ours
    refused = refusal(worker_manager(modules, monkeypatch), learner)
    assert "each worker must have some of model.layers.1.mlp.gate_proj B, got none" in refused
    modules[0][1].n_slices = 3
    assert "must compute with a learner's module in one piece" in refusal(worker_manager(modules, monkeypatch), learner)
