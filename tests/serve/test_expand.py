"""Slots composed from low-rank factors have the bits of slots composed from what the factors decode to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.wire.codecs.lowrank import RANK, LowRankCodec, unpacked
from bank_service.wire.record import GradientSpec
from regrad_vllm.adapt.loops.compose_slot import compose_slot
from regrad_vllm.adapt.slot_table import Shard, SlotTable, whole
from regrad_vllm.adapt.stored_gradient import FACTORS, FLOAT32, Payload, StoredGradient
from regrad_vllm.layout import Layout

# Rank, inputs, outputs: a learner's own; sides that are shorter than the rank; no multiple of a block.
SHAPES = [(16, 576, 1536), (16, 1536, 576), (64, 640, 48), (64, 48, 640), (20, 7, 9), (3, 131, 257), (1, 5, 300)]


def payloads(layout: Layout, seed: int) -> tuple[Payload, Payload]:
    """(factors, what they decode to) of a gradient of which several components of every tensor are kept."""
    spec = GradientSpec("0" * 64, layout.id, tuple(tensor.shape for tensor in layout.tensors))
    codec = LowRankCodec(4)
    values = np.random.default_rng(seed).standard_normal(layout.num_values, dtype=np.float32)
    payload = memoryview(codec.encode(values, spec))
    factors = unpacked(payload, spec)
    decoded = np.empty(layout.num_values, np.float32)
    codec.decode(payload, spec, decoded)
    return (
        Payload(FACTORS, factors.codes, factors.scales, factors.shorts, factors.table),
        Payload(FLOAT32, decoded),
    )


def composed(layout: Layout, shards: Any, chosen: list[Payload], dtype: torch.dtype, rank: int) -> torch.Tensor:
    table = SlotTable.build(layout, shards, rank)
    slot = torch.zeros(table.num_values, dtype=dtype)
    gradients = [StoredGradient(payload.kind, payload.arrays) for payload in chosen]
    phi = np.random.default_rng(0).standard_normal(layout.num_values, dtype=np.float32)
    steps = [0.7 / (number + 1) for number in range(len(chosen))]
    assert compose_slot(slot, phi, gradients, steps, table, 2.0)
    return slot


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_of_factors_has_the_bits_of_the_decoded_gradients(
    shape: tuple[int, int, int], num_shards: int, dtype: torch.dtype
) -> None:
    rank, inputs, outputs = shape
    layout = Layout.build(rank, [("m.0", inputs, outputs), ("m.1", inputs, outputs)])
    pairs = [payloads(layout, seed) for seed in (1, 2)]
    if min(inputs, outputs, rank) > 1:
        assert sum(int(row[RANK]) > 1 for row in pairs[0][0].table) >= 2, "steps from one component to the next"  # type: ignore[union-attr]
    for part in range(num_shards):
        shards = dict(whole(layout))
        if num_shards > 1:  # A by its columns, B by its rows, as row- and column-parallel layers have them
            for tensor in layout.tensors:
                side = tensor.shape[1] if tensor.part == "A" else tensor.shape[0]
                mine = range(side // num_shards * part, side // num_shards * (part + 1))
                ranks = range(rank)
                shards[tensor.module, tensor.part] = Shard(ranks, mine) if tensor.part == "A" else Shard(mine, ranks)
        factors, decoded = (
            composed(layout, shards, [pair[which] for pair in pairs], dtype, rank) for which in range(2)
        )
        assert torch.equal(factors, decoded)
        assert factors.any()


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 40), inputs=st.integers(2, 300), outputs=st.integers(2, 300), seed=st.integers(0, 9))
def test_of_any_shape(rank: int, inputs: int, outputs: int, seed: int) -> None:
    layout = Layout.build(rank, [("m.0", inputs, outputs)])
    factors, decoded = payloads(layout, seed)
    slots = [composed(layout, whole(layout), [own], torch.float32, rank) for own in (factors, decoded)]
    assert torch.equal(*slots)
