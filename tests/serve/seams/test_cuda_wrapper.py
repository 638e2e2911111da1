"""LoRA in a batch of our requests, operators' own adapters and base rows, on CUDA GPUs. vLLM's own bookkeeping."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from regrad_vllm.serve.recipe import ADAPTER_ID
from tests.serve.kernels.device import DEVICE, Case, Request, kernels

__all__ = ["kernels"]

SLOTS: list[int | None] = [5, ADAPTER_ID, 9]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``cuda_wrapper``. vLLM imports what it needs where it sees a GPU."""
    wrapper = importlib.import_module("vllm.lora.punica_wrapper.punica_gpu")
    monkeypatch.setattr(wrapper, "LoRAKernelMeta", LoRAKernelMeta, raising=False)
    found = importlib.import_module("regrad_vllm.serve.seams.cuda_wrapper")
    yield found
    found.LAYERS.clear()


def made(module: Any, max_loras: int = 3) -> Any:
    config = SimpleNamespace(max_loras=max_loras, specialize_active_lora=False)
    return module.CudaPunicaWrapper(32, 8, DEVICE, lora_config=config)


def tell(wrapper: Any, *ids: int) -> None:
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), SLOTS, len(SLOTS), 1000)


def test_vllms_kernels_see_operators_rows_alone(module: Any) -> None:
    wrapper = made(module)
    tell(wrapper, ADAPTER_ID, 0, 5, ADAPTER_ID, 9)
    for meta in (wrapper.token_mapping_meta, wrapper.prompt_mapping_meta):
        assert meta.token_lora_mapping[:5].tolist() == [-1, -1, 0, -1, 2]
        assert sorted(meta.active_lora_ids.tolist())[-2:] == [0, 2] and not meta.no_lora_flag_cpu.item()


def test_vllms_kernels_are_told_nothing_while_no_operator_has_a_row(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    original = LoRAKernelMeta.prepare_tensors
    monkeypatch.setattr(
        LoRAKernelMeta, "prepare_tensors", lambda self, slots: (told.append(len(slots)), original(self, slots))
    )
    wrapper = made(module)
    tell(wrapper, ADAPTER_ID, 5)
    assert told == [2, 2], "tokens and prompts"
    tell(wrapper, ADAPTER_ID, ADAPTER_ID, 0)
    assert told == [2, 2, 3, 3], "they forget the operator's row"
    assert (wrapper.token_mapping_meta.active_lora_ids == -1).all() and wrapper.token_mapping_meta.no_lora_flag_cpu
    tell(wrapper, ADAPTER_ID)
    tell(wrapper, 0, ADAPTER_ID)
    assert len(told) == 4
    tell(wrapper, 9)
    assert len(told) == 6


def test_rows_of_all_kinds_in_one_batch(module: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        module.PunicaWrapperGPU, "add_lora_linear", lambda self, y, *args, **kwargs: theirs.append(tuple(y.shape))
    )
    case = Case(16, 128, (128,), ["factors-4-1-8"])
    tables = case.tables(kernels)
    stack, other = (torch.zeros(3, 1, 16, 128, device=DEVICE) for _ in range(2))
    b = torch.zeros(3, 1, 128, 16, device=DEVICE)
    module.LAYERS[stack.data_ptr()] = case.layer(kernels, tables)
    wrapper = made(module)
    requests: list[Request] = [(1, [0]), None, None, (1, [])]  # the third is an operator's
    tables.write(case.batch(requests))
    tell(wrapper, ADAPTER_ID, 0, 5, ADAPTER_ID)
    x, y = (tensor.to(DEVICE) for tensor in case.inputs_of(4))
    after = y.clone()
    wrapper.add_lora_linear(after, x, (stack,), (b,), 1.0, (128,))
    assert theirs == [(4, 128)]
    assert torch.allclose(after.cpu().double(), case.expected(x.cpu(), y.cpu(), requests), rtol=1e-4, atol=1e-4)
    assert torch.equal(after[1:3], y[1:3]) and not torch.equal(after[0], y[0])
    again = y.clone()
    wrapper.add_lora_linear(again, x, (other,), (b,), 1.0, (128,))
    assert torch.equal(again, y), "a layer that the learner doesn't adapt"
    tell(wrapper, 0, 0, 0, 0)
    wrapper.add_lora_linear(again, x, (stack,), (b,), 1.0, (128,))
    assert torch.equal(again, y), "a graph that is captured for the base model has no launch of ours"


def test_without_room_for_operators_vllms_kernels_are_not_launched(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.PunicaWrapperGPU, "add_lora_linear", lambda *args, **kwargs: pytest.fail("launched"))
    wrapper = made(module, max_loras=1)
    stack, b = torch.zeros(1, 1, 16, 128, device=DEVICE), torch.zeros(1, 1, 128, 16, device=DEVICE)
    wrapper.add_lora_linear(
        torch.zeros(2, 128, device=DEVICE), torch.zeros(2, 128, device=DEVICE), (stack,), (b,), 1.0, (128,)
    )
