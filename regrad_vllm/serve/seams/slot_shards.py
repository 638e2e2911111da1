"""The parts of a learner's tensors that one worker computes with under tensor parallelism, by vLLM's own slicing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrad_vllm.layout import Layout, LoraTensor, Part
from regrad_vllm.learner import Learner
from regrad_vllm.serve.kernels.layer_slice import MAX_RANK, LayerSlice
from regrad_vllm.serve.seams import worker_seams


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one LoRA tensor that a worker computes with. It is a block of rows and columns."""

    rows: range
    columns: range


def layer_slices(modules: Sequence[tuple[Sequence[str], Any]], learner: Learner) -> dict[int, list[LayerSlice]]:
    """The linear layers that the learner adapts: address → all slices of the layer, in order.

    The address is that of the layer's first stacked A, which vLLM hands to its LoRA wrapper. φ* is float32, on the
    host. ValueError as in ``shards``.
    """
    found = shards(modules, learner.layout)
    views = learner.layout.views(torch.tensor(learner.phi))
    tensors = {(tensor.module, tensor.part): (index, view) for index, (tensor, view) in enumerate(views)}
    layers = {}
    for names, module in modules:
        if not any((name, "A") in found for name in names):
            continue
        slices = []
        for name, stack in zip(names, module.lora_b_stacked, strict=True):
            if (name, "A") not in found:
                slices.append(LayerSlice(int(stack.shape[2])))
                continue
            (index_a, a), (index_b, b) = tensors[name, "A"], tensors[name, "B"]
            inputs, outputs = found[name, "A"].columns, found[name, "B"].rows
            slices.append(
                LayerSlice(
                    len(outputs),
                    a[:, inputs.start : inputs.stop],
                    b[outputs.start : outputs.stop],
                    index_a,
                    index_b,
                    inputs.start,
                    outputs.start,
                    (a.shape[1], b.shape[0]),
                )
            )
        layers[module.lora_a_stacked[0].data_ptr()] = slices
    return layers


def shards(modules: Sequence[tuple[Sequence[str], Any]], layout: Layout) -> dict[tuple[str, Part], Shard]:
    """(module, part) → the shard of that tensor on this worker.

    The learner may adapt only some slices of a merged layer. ValueError if a layer's slices aren't contiguous blocks.
    """
    tensors = {(tensor.module, tensor.part): tensor for tensor in layout.tensors}
    here = {name for names, _ in modules for name in names}
    found: dict[tuple[str, Part], Shard] = {}
    for names, module in modules:
        if not any((name, "A") in tensors for name in names):
            continue  # the learner doesn't adapt it
        for part in ("A", "B"):
            ours = [tensors.get((name, part)) for name in names]
            whole = [None if tensor is None else _indices(tensor) for tensor in ours]
            for tensor, local in zip(ours, _sliced(module, part, whole), strict=True):
                if tensor is not None:
                    found[tensor.module, part] = _shard(local, tensor)
    assert found.keys() == {key for key in tensors if key[0] in here}, "a module would be without its adapter"
    return found


def refusal(manager: Any, layout: Layout) -> str:
    """The reason why the learner can't be served on the manager's layers, with the remedy. Empty if it can."""
    if layout.rank > MAX_RANK:
        return f"the learner's rank must be at most {MAX_RANK}, got {layout.rank}; train a learner of a lower rank"
    modules = worker_seams.linear_modules(manager)
    linear = {name for names, _ in modules for name in names}
    wrapped = worker_seams.modules_of(manager)
    others = [module for module in layout.modules if module in wrapped and module not in linear]
    if others:
        return f"the learner's modules must be linear layers, {others[0]} is none in vLLM; train a learner without it"
    try:
        held = shards(modules, layout)
    except ValueError as error:
        return f"{error}; serve the model that the learner was trained on"
    for names, module in modules:
        for name, a, b in zip(names, module.lora_a_stacked, module.lora_b_stacked, strict=False):
            if (name, "A") not in held:
                continue
            expected = len(held[name, "A"].columns), len(held[name, "B"].rows)
            found = int(a.shape[3]), int(b.shape[2])
            if expected != found:
                return (
                    f"{name} must have the learner's {expected[0]} inputs and {expected[1]} outputs on this worker, "
                    f"got {found[0]} and {found[1]}; serve the model that the learner was trained on"
                )
    return ""


def _sliced(module: Any, part: Part, tensors: list[Any]) -> list[Any]:
    """The part of each slice's tensor that this worker's layer keeps. None stays None. ValueError."""
    if len(tensors) != module.n_slices:
        raise ValueError(
            f"vLLM must compute with a learner's module in one piece, it has {module.n_slices} for {len(tensors)}"
        )
    return worker_seams.sliced(module, part, tensors)


def _indices(tensor: LoraTensor) -> Tensor:
    return torch.arange(tensor.num_values).reshape(tensor.shape)


def _shard(local: Tensor, tensor: LoraTensor) -> Shard:
    if not local.numel():
        raise ValueError(f"each worker must have some of {tensor.module} {tensor.part}, got none of {tensor.shape}")
    columns = tensor.shape[1]
    row, column = divmod(int(local[0, 0]), columns)
    shard = Shard(range(row, row + local.shape[0]), range(column, column + local.shape[1]))
    expected = _indices(tensor)[row : shard.rows.stop, column : shard.columns.stop]
    if not torch.equal(local, expected):
        raise ValueError(f"vLLM must give each worker one block of {tensor.module} {tensor.part}, it gives a mixture")
    return shard
