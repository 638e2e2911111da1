"""The shards of a learner's tensors on each tensor parallel worker, by vLLM's own slicing."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA

from regrad_vllm.layout import Layout
from regrad_vllm.learner import Learner, LearnerConfig
from regrad_vllm.serve.seams.slot_shards import Shard, layer_slices, shards


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


def test_a_layers_slices_say_where_the_learners_tensors_lie_in_them() -> None:
    layout = Layout.build(2, [("l.q_proj", 12, 24), ("l.v_proj", 12, 8)])
    config = LearnerConfig(base_digest="0" * 64, lora_alpha=4.0, step_size_kind="tie")
    phi = np.arange(layout.num_values, dtype=np.float32)
    views = [view for _, view in layout.views(phi)]
    layer = merged(1, 2, [24, 8, 8])
    layer.lora_a_stacked = [torch.zeros(3, 1, 2, 12) for _ in range(3)]
    layer.lora_b_stacked = [torch.zeros(3, 1, size, 2) for size in (12, 4, 4)]
    other = SimpleNamespace(lora_b_stacked=[torch.zeros(3, 1, 5, 2)])
    modules = [([f"l.{name}_proj" for name in "qkv"], layer), (["l.o_proj"], other)]
    ((address, slices),) = layer_slices(modules, Learner(config, layout, phi, np.ones(4, np.float32))).items()
    assert address == layer.lora_a_stacked[0].data_ptr()
    query, key, value = slices
    assert (key.outputs, key.a, key.tensor_a, key.tensor_b) == (4, None, -1, -1)
    for part, a, b, start in ((query, 0, 1, 12), (value, 2, 3, 4)):
        assert (part.tensor_a, part.tensor_b, part.first_input, part.first_output) == (a, b, 0, start)
        assert np.array_equal(part.a, views[a]) and part.whole == (12, len(views[b]))
        assert np.array_equal(part.b, views[b][start:]) and part.outputs == len(views[b]) - start


def test_a_shard_that_is_no_block_is_refused() -> None:
    layout = Layout.build(2, [("m", 4, 6)])
    scattered = SimpleNamespace(
        tp_size=2, n_slices=1, slice_lora_b=lambda tensor: tensor, slice_lora_a=lambda tensor: tensor[:, ::2]
    )
    with pytest.raises(ValueError, match="one block of m A"):
        shards([(["m"], scattered)], layout)
