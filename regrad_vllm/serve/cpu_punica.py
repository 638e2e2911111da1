"""vLLM's LoRA kernels on CPUs, replaced: each row with its own adapter, rows without one untouched.

vLLM's own (``lora/ops/torch_ops``) copy and convert the whole A and B of every row, and give a row without an adapter
(index −1) whatever lies in the last slot. The rest of its wrapper, the bookkeeping over rows and slots, stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

from regrad_vllm.adapt.loops.lora import LoraRows

# From as many rows in a row with one adapter on, a matrix product reads its A and B fewer times than the loop.
_SEGMENT_ROWS = 4


class _Rows:
    """Which rows of the batch have which slot: for this step, the same for all layers."""

    def __init__(self, slots: NDArray[np.int64]) -> None:
        self.num_rows = len(slots)
        starts = np.flatnonzero(np.diff(slots, prepend=-2))
        lengths = np.diff(starts, append=len(slots))
        adapted = slots[starts] >= 0
        long = adapted & (lengths >= _SEGMENT_ROWS)
        self.segments = [
            (int(start), int(start + length), int(slots[start]))
            for start, length in zip(starts[long], lengths[long], strict=True)
        ]
        single = np.repeat(adapted & ~long, lengths)
        self.rows = np.flatnonzero(single).astype(np.int64)
        self.slots = slots[self.rows]


class RowsPunicaWrapper(PunicaWrapperCPU):
    """What vLLM makes in each worker (``CpuPlatform.get_punica_wrapper``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _STATE.rows = _Rows(np.empty(0, np.int64))

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        _STATE.rows = _Rows(self.token_lora_indices.numpy().copy())

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y[row] += B[slot] (A[slot] x[row]) · scale, for each row with an adapter; scale is always 1 in vLLM."""
        if torch.compiler.is_compiling():
            torch.ops.vllm.regrad_add_lora(y, x, list(lora_a_stacked), list(lora_b_stacked), list(output_slices))
        else:
            _add_lora(y, x, list(lora_a_stacked), list(lora_b_stacked), list(output_slices))


class _State:
    """Of this process: a worker has one LoRA manager."""

    rows: _Rows
    layers: dict[int, LoraRows]  # by the address of the first A


_STATE = _State()
_STATE.layers = {}


def _add_lora(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], output_slices: list[int]) -> None:
    rows = _STATE.rows
    if x.shape[0] != rows.num_rows:
        raise ValueError(f"LoRA's rows must be the batch's {rows.num_rows}, got {x.shape[0]}")
    if rows.rows.size:
        layer = _STATE.layers.get(a[0].data_ptr())
        if layer is None:
            layer = _STATE.layers[a[0].data_ptr()] = LoraRows(a, b, output_slices)
        layer.add(y, x, rows.rows, rows.slots)
    for start, stop, slot in rows.segments:
        offset = 0
        for stacked_a, stacked_b, outputs in zip(a, b, output_slices, strict=True):
            h = x[start:stop] @ stacked_a[slot, 0].to(x.dtype).T
            y[start:stop, offset : offset + outputs].addmm_(h, stacked_b[slot, 0].to(x.dtype).T)
            offset += outputs


def _nothing(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], output_slices: list[int]) -> None:
    """What the compiler sees."""


direct_register_custom_op("regrad_add_lora", _add_lora, mutates_args=["y"], fake_impl=_nothing)
