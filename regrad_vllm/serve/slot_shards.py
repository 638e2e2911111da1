"""Which part of a learner's tensors a worker's LoRA layers compute with, by vLLM's own slicing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrad_vllm.adapt.slot_table import Shard
from regrad_vllm.layout import Layout, LoraTensor, Part
from regrad_vllm.serve import vllm_seams


def shards(modules: Sequence[tuple[Sequence[str], Any]], layout: Layout) -> dict[tuple[str, Part], Shard]:
    """What of each of the learner's tensors vLLM's layers on this worker compute with, by their own slicing."""
    tensors = {(tensor.module, tensor.part): tensor for tensor in layout.tensors}
    found: dict[tuple[str, Part], Shard] = {}
    for names, module in modules:
        if not all((name, "A") in tensors for name in names):
            continue  # another adapter's, or only partly ours, which ``refusal`` says
        for part in ("A", "B"):
            ours = [tensors[name, part] for name in names]
            for tensor, local in zip(ours, vllm_seams.sliced(module, part, list(map(_indices, ours))), strict=True):
                found[tensor.module, part] = _shard(local, tensor)
    return found


def _indices(tensor: LoraTensor) -> Tensor:
    return torch.arange(tensor.num_values).reshape(tensor.shape)


def _shard(local: Tensor, tensor: LoraTensor) -> Shard:
    columns = tensor.shape[1]
    row, column = divmod(int(local[0, 0]), columns)
    shard = Shard(range(row, row + local.shape[0]), range(column, column + local.shape[1]))
    expected = _indices(tensor)[row : shard.rows.stop, column : shard.columns.stop]
    if not torch.equal(local, expected):
        raise ValueError(f"vLLM must give each worker one block of {tensor.module} {tensor.part}, it gives a mixture")
    return shard
