"""LoRA on CPUs: each row with its own adapter, against the formula; vLLM's own bookkeeping, layers' memory as it is."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA

from regrad_vllm.adapt.loops.lora import LoraRows
from regrad_vllm.adapt.slot_table import Shard, SlotTable, whole
from regrad_vllm.layout import Layout
from regrad_vllm.serve.cpu_punica import RowsPunicaWrapper
from regrad_vllm.serve.slot_shards import shards

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def stacks(outputs: list[int], *, slots: int, rank: int, inputs: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """A and B of each slice as ``CpuSlots`` lays them, drawn."""
    a = tuple(torch.randn(slots, 1, rank, inputs).to(dtype) for _ in outputs)
    b = tuple(torch.randn(slots, 1, rank, out).to(dtype).transpose(2, 3) / rank for out in outputs)
    return a, b


def added(x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], slots: list[int]) -> Tensor:
    """The right addition to each row of y, in float64."""
    parts = []
    for one, other in zip(a, b, strict=True):
        rows = [
            other[slot, 0].double() @ (one[slot, 0].double() @ x[row].double())
            if slot >= 0
            else torch.zeros(other.shape[2], dtype=torch.float64)
            for row, slot in enumerate(slots)
        ]
        parts.append(torch.stack(rows))
    return torch.cat(parts, 1)


def wrapper(slots: list[int]) -> RowsPunicaWrapper:
    """vLLM's wrapper after it was told which row has which slot. Adapter ids are slots + 100."""
    made = RowsPunicaWrapper(512, 64, "cpu")
    ids = tuple(slot + 100 if slot >= 0 else 0 for slot in slots)
    made.update_metadata(LoRAMapping(ids, ids[:1], is_prefill=True), [100 + slot for slot in range(20)], 21, 1000)
    return made


@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize(
    "slots",
    [
        [0], [19], [-1], [3, 3, 3], [5, -1, 5, 2], list(range(20)), [-1, -1, 4, -1], [7] * 40,
        [2] * 9 + [-1] * 5 + [2] * 4 + [8, 1, 8] + [-1] + [6] * 30,
    ],
)  # fmt: skip
def test_each_row_gets_its_own_adapter_and_rows_without_one_nothing(
    values: torch.dtype, weights: torch.dtype, slots: list[int]
) -> None:
    torch.manual_seed(len(slots))
    outputs = [40, 300]
    a, b = stacks(outputs, slots=20, rank=16, inputs=48, dtype=weights)
    x, y = torch.randn(len(slots), 48).to(values), torch.randn(len(slots), 340).to(values)
    before = y.clone()
    wrapper(slots).add_lora_linear(y, x, a, b, 1.0, tuple(outputs))
    right = before.double() + added(x, a, b, slots)
    largest = max(1.0, float(right.abs().max()))
    assert float((y.double() - right).abs().max()) / largest < max(TOLERANCE[values], 1e-6)
    without = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[without], before[without]), "bit for bit"


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("num_rows", [4, 64, 500])
def test_a_rows_answer_does_not_depend_on_how_many_rows_its_prompts_piece_has(
    values: torch.dtype, weights: torch.dtype, num_rows: int
) -> None:
    """Rows of one segment against the same rows one by one: float32 sums in another order, each rounded once."""
    torch.manual_seed(num_rows)
    a, b = stacks([576, 200], slots=20, rank=16, inputs=300, dtype=weights)
    x, y = torch.randn(num_rows, 300).to(values), torch.randn(num_rows, 776).to(values)
    together, alone = y.clone(), y.clone()
    wrapper([5] * num_rows).add_lora_linear(together, x, a, b, 1.0, (576, 200))
    for row in range(num_rows):
        wrapper([5]).add_lora_linear(alone[row : row + 1], x[row : row + 1], a, b, 1.0, (576, 200))
    assert not torch.equal(together, y)
    assert float((together != alone).float().mean()) < 0.01, "only where the sum is halfway between two values"
    assert torch.allclose(together.float(), alone.float(), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int, num_rows: int) -> None:
    torch.manual_seed(1)
    a, b = stacks([33, 700], slots=6, rank=8, inputs=20, dtype=torch.bfloat16)
    layer = LoraRows(a, b, [33, 700])
    rows, slots = np.arange(num_rows), np.arange(num_rows) % 6
    x = torch.randn(num_rows, 20).to(torch.bfloat16)
    results = []
    before = torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        y = torch.zeros(num_rows, 733, dtype=torch.bfloat16)
        layer.add(y, x, rows, slots)
        results.append(y)
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_tensors_that_lie_otherwise_in_memory_are_refused() -> None:
    a = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="must be .rank, in. and B .rank, out. in memory"):
        LoraRows([a], [torch.zeros(2, 1, 6, 4)], [6])


def test_a_batch_of_another_size_than_the_mapping_is_an_error() -> None:
    a, b = stacks([8], slots=20, rank=4, inputs=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="must be the batch's 2, got 3"):
        wrapper([0, 1]).add_lora_linear(torch.zeros(3, 8), torch.zeros(3, 8), a, b, 1.0, (8,))


def merged(tp_rank: int, tp_size: int, sizes: list[int]) -> Any:
    """gate_up_proj or qkv_proj, with vLLM's own slicing."""
    layer = SimpleNamespace(
        tp_size=tp_size, n_slices=len(sizes), output_ids=(tp_rank,) * len(sizes),
        output_slices=tuple(size // tp_size for size in sizes),
    )  # fmt: skip
    layer.slice_lora_a = partial(MergedColumnParallelLinearWithLoRA.slice_lora_a, layer)
    layer.slice_lora_b = partial(MergedColumnParallelLinearWithLoRA.slice_lora_b, layer)
    return layer


def row_parallel(tp_rank: int, tp_size: int, inputs: int) -> Any:
    """down_proj as vLLM shards it."""
    size = inputs // tp_size
    return SimpleNamespace(
        tp_size=tp_size, n_slices=1, slice_lora_b=lambda tensor: tensor,
        slice_lora_a=lambda tensor: tensor[:, tp_rank * size : (tp_rank + 1) * size],
    )  # fmt: skip


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_shards_of_all_workers_are_the_whole_learner(tp_size: int) -> None:
    layout = Layout.build(4, [("l.gate_proj", 12, 24), ("l.up_proj", 12, 24), ("l.down_proj", 24, 12)])
    seen = np.zeros(layout.num_values, int)
    flat = np.arange(layout.num_values)
    for tp_rank in range(tp_size):
        modules = [
            (["l.gate_proj", "l.up_proj"], merged(tp_rank, tp_size, [24, 24])),
            (["l.down_proj"], row_parallel(tp_rank, tp_size, 24)),
        ]
        table = SlotTable.build(layout, shards(modules, layout), 8)
        assert table.num_values == sum(8 * tensor.width for tensor in table.tensors)
        for (_, part), shard in shards(modules, layout).items():
            assert len(shard.columns if part == "B" else shard.rows) == 4, "the rank is never cut"
        for name, (tensor, view) in zip([(t.module, t.part) for t in layout.tensors], layout.views(flat), strict=True):
            shard = shards(modules, layout)[name]
            seen[view[shard.rows.start : shard.rows.stop, shard.columns.start : shard.columns.stop]] += 1
            assert tensor.module == name[0]
    down_b = next(tensor for tensor in layout.tensors if (tensor.module, tensor.part) == ("l.down_proj", "B"))
    gate_a = [tensor for tensor in layout.tensors if tensor.part == "A" and tensor.module != "l.down_proj"]
    expected = np.ones(layout.num_values, int)
    for replicated in (down_b, *gate_a):  # every worker needs these whole
        expected[replicated.slice] = tp_size
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("ours", [("q_proj", "v_proj"), ("k_proj",), ("q_proj", "k_proj", "v_proj")])
def test_a_merged_layer_may_be_the_learners_in_some_of_its_slices(ours: tuple[str, ...], tp_size: int) -> None:
    sizes = {"q_proj": 24, "k_proj": 8, "v_proj": 8}
    layout = Layout.build(2, [(f"l.{name}", 12, sizes[name]) for name in ours])
    for tp_rank in range(tp_size):
        modules = [([f"l.{name}" for name in sizes], merged(tp_rank, tp_size, list(sizes.values())))]
        found = shards(modules, layout)
        assert list(found) == [(f"l.{name}", part) for part in ("A", "B") for name in ours]
        for name in ours:
            local = sizes[name] // tp_size
            assert found[f"l.{name}", "A"] == Shard(range(2), range(12))
            assert found[f"l.{name}", "B"] == Shard(range(local * tp_rank, local * (tp_rank + 1)), range(2))
        assert len(SlotTable.build(layout, found, 2).tensors) == 2 * len(ours)


def test_a_shard_that_is_no_block_or_leaves_its_tensor_is_refused() -> None:
    layout = Layout.build(2, [("m", 4, 6)])
    scattered = SimpleNamespace(
        tp_size=2, n_slices=1, slice_lora_b=lambda tensor: tensor, slice_lora_a=lambda tensor: tensor[:, ::2]
    )
    with pytest.raises(ValueError, match="one block of m A"):
        shards([(["m"], scattered)], layout)
    with pytest.raises(ValueError, match="rank must be at least"):
        SlotTable.build(layout, whole(layout), 1)
    with pytest.raises(ValueError, match="must lie in"):
        SlotTable.build(layout, {("m", "A"): Shard(range(2), range(1, 5))}, 2)
