"""The seams: that the installed vLLM is as it was read, and that a changed one is noticed."""

from __future__ import annotations

import inspect
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.utils import sched_yield
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.v1.core import kv_cache_utils
from vllm.v1.metrics.stats import LoRARequestStates, SchedulerStats
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.seams import worker_seams
from regrad_vllm.serve.seams.seam import SeamError, check_seams
from regrad_vllm.serve.seams.server_seams import (
    SERVER_SEAMS,
    ServedCall,
    check_prefix_keys,
    install_bounded_lora_metrics,
    install_served_call,
    make_served_call,
    served_call,
)
from regrad_vllm.serve.seams.worker_patches import (
    StepRequests,
    check_room,
    check_whole,
    install_steps,
    install_waits,
)
from regrad_vllm.serve.seams.worker_seams import CPU_SEAMS, WORKER_SEAMS


def test_the_installed_vllm_has_every_seam() -> None:
    check_seams(WORKER_SEAMS)
    check_seams(CPU_SEAMS)
    check_seams(SERVER_SEAMS)


@pytest.mark.parametrize("seam", [seam for seam in WORKER_SEAMS + SERVER_SEAMS if seam.parameters])
def test_a_seam_with_other_parameters_is_an_error_that_names_it(seam: object) -> None:
    changed = replace(seam, parameters=("self", "something_new"))  # type: ignore[type-var]
    with pytest.raises(SeamError, match=f"{changed.path} must take .*something_new.*0.32.0"):  # type: ignore[attr-defined]
        check_seams((*WORKER_SEAMS, changed))  # type: ignore[arg-type]


def test_a_seam_that_is_gone_is_an_error_that_says_what_it_was_for() -> None:
    gone = replace(WORKER_SEAMS[0], path="WorkerLoRAManager.load_adapter_v2")
    missing = replace(WORKER_SEAMS[1], module="vllm.lora.nowhere")
    with pytest.raises(SeamError, match="load_adapter_v2 must exist.*loads an adapter.*vllm.lora.nowhere"):
        check_seams((gone, missing))


def test_a_process_that_waits_for_another_leaves_its_core_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)  # gets it back at the end
    monkeypatch.setattr(worker_seams, "is_cpu", lambda: False)
    install_waits()
    assert shm_broadcast.sched_yield is sched_yield, "GPUs have cores to spare"
    monkeypatch.setattr(worker_seams, "is_cpu", lambda: True)
    install_waits()
    assert shm_broadcast.sched_yield is not sched_yield
    writer = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
    begun = time.process_time()
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.4)
    assert time.process_time() - begun < 0.2, "a loop of yields takes the whole time, on a core of its own"


def test_a_prefix_cache_that_knows_adapters_by_id_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_prefix_keys()
    monkeypatch.setattr(kv_cache_utils, "_gen_lora_extra_hash_keys", lambda request: [request.lora_request.lora_int_id])
    with pytest.raises(SeamError, match="must tell adapters apart by name"):
        check_prefix_keys()


def test_vllms_cpu_kernels_give_a_row_without_adapter_the_last_slot() -> None:
    """Why layers that ours don't compute are refused on CPUs. When this fails, they can be let in."""
    slots = torch.zeros(3, 1, 4, 8)
    slots[-1] = 1.0
    x, rows = torch.ones(2, 8), torch.tensor([0, -1])
    shrunk = torch.zeros(2, 4)
    bgmv_shrink(x, slots, shrunk, rows)
    out = torch.zeros(2, 8)
    bgmv_expand(shrunk, slots.transpose(2, 3), out, rows)
    assert out[0].abs().sum() == 0
    assert out[1].abs().sum() > 0


def test_adapters_count_under_one_name_in_vllms_metric() -> None:
    install_bounded_lora_metrics()
    install_bounded_lora_metrics()  # idempotent
    states = LoRARequestStates(log_stats=True)
    gauge = Gauge("info", "x", ["running", "waiting"], registry=CollectorRegistry())
    for number in range(50):
        states.request_waiting(f"w{number}", f"regrad-{number:040x}")
        states.request_running(f"r{number}", f"regrad-{number + 1000:040x}")
        states.request_running("other", "somebody-elses")
        stats = SchedulerStats()
        states.update_scheduler_stats(stats)
        assert set(stats.running_lora_adapters) == {"regrad", "somebody-elses"}
        assert stats.waiting_lora_adapters["regrad"] == stats.running_lora_adapters["regrad"] == number + 1
        gauge.labels(",".join(stats.running_lora_adapters), ",".join(stats.waiting_lora_adapters)).set(1)
    assert len(list(gauge.collect())[0].samples) == 1


class _Part:
    """Stands for the plugin's part of a model runner."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[str], list[int], list[object]] | None] = []

    def set_step(self, requests: StepRequests | None) -> None:
        if requests is not None:
            adapters = [requests.adapter(id) for id in requests.ids]
            self.steps.append((list(requests.ids), requests.num_tokens.tolist(), adapters))
        else:
            self.steps.append(None)


def _as_installed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, function: Any = None) -> None:
    monkeypatch.setattr(owner, name, function or inspect.unwrap(getattr(owner, name)))


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> _Part:
    """The part that learns about steps, with the hooks installed."""
    made = _Part()
    _as_installed(monkeypatch, LoRAModelRunnerMixin, "load_lora_model", lambda self, *args: "the model")
    _as_installed(monkeypatch, LoRAModelRunnerMixin, "set_active_loras")
    _as_installed(monkeypatch, LoRAModelRunnerMixin, "_set_active_loras")
    _as_installed(monkeypatch, LoraState, "make_lora_inputs")
    install_steps(lambda runner: made)
    install_steps(lambda runner: _Part())  # idempotent
    return made


class _Manager:
    """Stands for the worker's LoRA manager."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        self.told.append((requests, mapping.index_mapping))


def _adapter(gamma: float) -> Any:
    return make_served_call(Recipe("0" * 64, ("1" * 64,), (1.0,), gamma), "m").lora_request


def test_the_older_model_runner_tells_about_every_step_and_dummy_run(part: _Part) -> None:
    runner: Any = LoRAModelRunnerMixin()
    assert runner.load_lora_model(None, None, None) == "the model"
    runner.lora_manager = _Manager()
    first, second = _adapter(1.0), _adapter(0.5)
    runner.requests = {"a": SimpleNamespace(lora_request=first), "b": SimpleNamespace(lora_request=None),
                       "c": SimpleNamespace(lora_request=second)}  # fmt: skip
    batch = SimpleNamespace(
        req_ids=["c", "b", "a"], make_lora_inputs=lambda tokens, sampled: ((5, 0, 5), (5, 5, 0, 5), {first})
    )
    runner.set_active_loras(batch, np.array([2, 1, 1]))
    runner._set_active_loras((0,), (0,), set())
    assert part.steps == [(["c", "b", "a"], [2, 1, 1], [second, None, first]), None]
    assert runner.lora_manager.told == [({first}, (5, 5, 0, 5)), (set(), (0,))]


def test_the_newer_model_runner_tells_about_every_step_and_dummy_run(part: _Part) -> None:
    runner: Any = LoRAModelRunnerMixin()
    runner.load_lora_model(None, None, None)
    runner.lora_manager, runner.lora_state = _Manager(), LoraState(3)
    first, second = _adapter(1.0), _adapter(0.5)
    assert first.lora_int_id == second.lora_int_id == 2**31 - 1 and first != second
    runner.lora_state.add_request("a", 1, first)
    runner.lora_state.add_request("b", 2, second)
    inputs = runner.lora_state.make_lora_inputs(["b", "x", "a"], np.array([2, 0, 1]), np.array([2, 1, 1]))
    runner._set_active_loras(*inputs)
    runner._set_active_loras((0,), (0,), set())
    assert part.steps == [(["b", "x", "a"], [2, 1, 1], [second, None, first]), None]
    assert runner.lora_manager.told[0] == ({first, second}, (2**31 - 1, 2**31 - 1, 0, 2**31 - 1))


@pytest.mark.parametrize(("told", "adapters", "expected"), [(None, 1, 1), (0, 1, 0), (None, None, None)])
def test_a_request_runs_on_its_adapters_rank_where_vllm_forgets_to_say_one(
    monkeypatch: pytest.MonkeyPatch, told: int | None, adapters: int | None, expected: int | None
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    seen: list[Any] = []

    def generate(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs["data_parallel_rank"]))

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    for place in ((BaseServing, "_maybe_get_adapters"), (OpenAIServingModels, "model_name")):
        monkeypatch.setattr(*place, inspect.unwrap(getattr(*place)))
    install_served_call()
    recipe = Recipe("0" * 64, ("1" * 64,), (1.0,), 1.0)
    with served_call(make_served_call(recipe, "m", adapters)):
        AsyncLLM.generate(None, "prompt", data_parallel_rank=told)  # type: ignore[arg-type,call-arg]
    assert seen == [(("prompt",), expected)]


def test_each_of_several_prompts_is_generated_with_its_own_adapter_on_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    seen: list[tuple[str, Any, Any]] = []

    def generate(self: Any, prompt: str, params: None, request_id: str, **kwargs: Any) -> None:
        seen.append((prompt, kwargs["lora_request"], kwargs["data_parallel_rank"]))

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    for place in ((BaseServing, "_maybe_get_adapters"), (OpenAIServingModels, "model_name")):
        monkeypatch.setattr(*place, inspect.unwrap(getattr(*place)))
    install_served_call()
    calls = [make_served_call(Recipe("0" * 64, (), (), float(rank)), "m", rank) for rank in (0, 1)]
    with served_call(ServedCall(None, "m", prompt_calls=(*calls, ServedCall(None, "m")))):
        for number, text in enumerate("abc"):
            AsyncLLM.generate(None, text, None, f"cmpl-id-7-{number}", lora_request="x")  # type: ignore[arg-type]
    assert seen == [("a", calls[0].lora_request, 0), ("b", calls[1].lora_request, 1), ("c", None, None)]


def test_a_recipes_request_is_named_by_its_content_and_shares_its_id_with_all_others() -> None:
    recipe = Recipe("0" * 64, ("1" * 64,), (1.0,), 1.0)
    first = make_served_call(recipe, "m").lora_request
    again = make_served_call(replace(recipe), "m").lora_request
    other = make_served_call(replace(recipe, gamma=0.5), "m").lora_request
    assert first is not None and again is not None and other is not None
    assert (first.lora_name, first.lora_path) == (again.lora_name, again.lora_path)
    assert first.lora_name != other.lora_name and first.lora_int_id == other.lora_int_id
    assert Recipe.parse(first.lora_path) == recipe


def test_an_operators_adapter_that_would_be_served_in_part_is_refused() -> None:
    names = ["", "l.0.attn", "l.0.attn.qkv_proj", "l.0.mlp", "l.0.mlp.gate_up_proj", "l.1"]  # l.1: another stage's
    manager = SimpleNamespace(
        modules={"l.0.mlp.gate_up_proj": None},
        packed_modules={"l.0.mlp.gate_up_proj": ["l.0.mlp.gate_proj", "l.0.mlp.up_proj"]},
        packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj"], "gate_up_proj": ["gate_proj", "up_proj"]},
        model=SimpleNamespace(named_modules=lambda: [(name, None) for name in names]),
    )
    check_whole(manager, "mine", ["l.0.mlp.gate_proj", "l.0.mlp.up_proj", "l.1.mlp.up_proj"])
    with pytest.raises(ValueError, match=r"adapter mine .* on 1 others, such as l.0.attn.q_proj; .*_up_proj qkv"):
        check_whole(manager, "mine", ["l.0.mlp.up_proj", "l.0.attn.q_proj"])


def test_an_operators_adapter_without_a_slot_of_its_own_is_refused_on_gpus() -> None:
    check_room("mine", 2)
    with pytest.raises(ValueError, match=r"adapter mine .* has 1 in all; start regrad serve with --max-loras 1"):
        check_room("mine", 1)
