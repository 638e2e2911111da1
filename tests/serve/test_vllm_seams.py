"""The seams: that the installed vLLM is as it was read, and that a changed one is noticed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.v1.metrics.stats import LoRARequestStates, SchedulerStats

from regrad_vllm.serve.recipe import Recipe
from regrad_vllm.serve.vllm_patches import check_whole, install_wide_ids
from regrad_vllm.serve.vllm_seams import WORKER_SEAMS, SeamError, check_seams
from regrad_vllm.serve.vllm_server_seams import (
    SERVER_SEAMS,
    ServedCall,
    install_bounded_lora_metrics,
    install_served_call,
    make_served_call,
    served_call,
)


def test_the_installed_vllm_has_every_seam() -> None:
    check_seams(WORKER_SEAMS)
    check_seams(SERVER_SEAMS)


@pytest.mark.parametrize("seam", [seam for seam in WORKER_SEAMS + SERVER_SEAMS if seam.parameters])
def test_a_seam_with_other_parameters_is_an_error_that_names_it(seam: object) -> None:
    changed = replace(seam, parameters=("self", "something_new"))  # type: ignore[type-var]
    with pytest.raises(SeamError, match=f"{changed.path} must take .*something_new.*0.32.0"):  # type: ignore[attr-defined]
        check_seams((*WORKER_SEAMS, changed))  # type: ignore[arg-type]


def test_a_seam_that_is_gone_is_an_error_that_says_what_it_was_for() -> None:
    gone = replace(WORKER_SEAMS[0], path="WorkerLoRAManager.load_adapter_v2")
    missing = replace(WORKER_SEAMS[1], module="vllm.lora.nowhere")
    with pytest.raises(SeamError, match="load_adapter_v2 must exist.*turns a regrad.*vllm.lora.nowhere"):
        check_seams((gone, missing))


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


def test_the_gpus_model_runner_keeps_our_adapters_ids_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.lora_utils import LoraState

    monkeypatch.setattr(LoraState, "__init__", inspect.unwrap(LoraState.__init__))
    install_wide_ids()
    install_wide_ids()  # idempotent
    state = LoraState(2)
    lora = make_served_call(Recipe("/dev/shm/a", "0" * 64, ("1" * 64,), (1.0,), 1.0), "m").lora_request
    assert lora is not None and lora.lora_int_id > 2**31
    state.add_request("a", 1, lora)
    prompts, tokens, requests = state.make_lora_inputs(["a"], np.array([1, 0]), np.array([2, 1]))
    assert prompts == (lora.lora_int_id, 0) and tokens == (lora.lora_int_id, lora.lora_int_id, 0)
    assert requests == {lora}


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
    recipe = Recipe("/dev/shm/a", "0" * 64, ("1" * 64,), (1.0,), 1.0)
    with served_call(make_served_call(recipe, "m", adapters)):
        AsyncLLM.generate(None, "prompt", data_parallel_rank=told)  # type: ignore[arg-type,call-arg]
    assert seen == [(("prompt",), expected)]


def test_each_of_several_prompts_is_generated_inside_the_call_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    events: list[Any] = []

    async def generate(self: Any, prompt: str, params: None, request_id: str, **kwargs: Any) -> AsyncIterator[str]:
        try:
            for word in ("one", "two"):
                yield f"{prompt} {word} {kwargs['lora_request'].lora_name} {kwargs['data_parallel_rank']}"
        finally:
            events.append(f"{prompt} ends")

    @asynccontextmanager
    async def prompt_call(number: int) -> AsyncIterator[ServedCall]:
        try:
            yield make_served_call(Recipe("/a", "0" * 64, (), (), float(number)), "m", number)
        finally:
            events.append(f"{number} is let go")

    async def run() -> None:
        with served_call(ServedCall(None, "m", prompt_call=prompt_call)):
            outputs = [AsyncLLM.generate(None, text, None, f"cmpl-id-7-{n}") for n, text in enumerate("ab")]  # type: ignore[arg-type]
        names = [make_served_call(Recipe("/a", "0" * 64, (), (), float(n)), "m").lora_request.lora_name for n in (0, 1)]
        assert await anext(outputs[1]) == f"b one {names[1]} 1"
        assert [output async for output in outputs[0]] == [f"a one {names[0]} 0", f"a two {names[0]} 0"]
        assert events == ["a ends", "0 is let go"]
        await outputs[1].aclose()
        assert events[2:] == ["b ends", "1 is let go"], "the engine's part ends before the adapter's hold"

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    for place in ((BaseServing, "_maybe_get_adapters"), (OpenAIServingModels, "model_name")):
        monkeypatch.setattr(*place, inspect.unwrap(getattr(*place)))
    install_served_call()
    asyncio.run(run())


def test_a_recipes_request_is_named_by_its_content_wherever_the_bytes_lie() -> None:
    recipe = Recipe("/dev/shm/a", "0" * 64, ("1" * 64,), (1.0,), 1.0)
    first = make_served_call(recipe, "m").lora_request
    moved = make_served_call(replace(recipe, arena="/dev/shm/b"), "m").lora_request
    other = make_served_call(replace(recipe, gamma=0.5), "m").lora_request
    assert (first.lora_name, first.lora_int_id) == (moved.lora_name, moved.lora_int_id)
    assert first.lora_name != other.lora_name and first.lora_int_id != other.lora_int_id
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
