"""Our LoRA kernels for vLLM on CPUs. Each row gets its own adapter, and rows without an adapter stay as they are.

They replace vLLM's kernels (``lora/ops/torch_ops``), which copy and convert the whole A and B of every row. Those
also give a row without an adapter (index −1) the adapter of the last slot. The rest of vLLM's wrapper, the bookkeeping
over rows and slots, is used unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from regrad_vllm.adapt.loops.lora import LoraRows

# With so many successive rows of one adapter, a matrix product reads A and B less often than the loop.
_SEGMENT_ROWS = 4
_BLOCK_VALUES = 2**17  # of x or y that a segment widens to float32 at a time


class _Rows:
    """The slot of each row in the batch. It is the same for all layers of one step."""

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
    """The wrapper that vLLM makes in each worker (``CpuPlatform.get_punica_wrapper``)."""

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
        # torch.compile would not see the loops' writes, so this must not run inside it. vLLM doesn't compile with LoRA
        # on CPUs, and ``engine.check_engine_settings`` refuses a setting that does.
        _add_lora(y, x, lora_a_stacked, lora_b_stacked, output_slices)


class _State:
    """The state of this process. A worker has one LoRA manager."""

    rows: _Rows
    layers: dict[int, LoraRows]  # by the address of the first A


_STATE = _State()
_STATE.layers = {}


def _add_lora(y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], output_slices: Sequence[int]) -> None:
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
            _add_segment(
                y[start:stop, offset : offset + outputs], x[start:stop], stacked_a[slot, 0], stacked_b[slot, 0]
            )
            offset += outputs


def _add_segment(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """y += B (A x) for rows with one adapter, in float32 and rounded once, as in the loop.

    So an answer does not depend on the chunks that its prompt is computed in.
    y: (rows, out), x: (rows, in), a: (rank, in), b: (out, rank).

    Two-byte types are widened in blocks of rows, so that a block is still in the CPU's cache when it is rounded.
    Measured against PyTorch's products of bfloat16 (576 to 1536, rank 16, a core with AVX-512's bfloat16):
    - 4 rows: 28 against 60 µs;
    - 64 rows: 92 against 121 µs;
    - whole prompts of 2048 rows: 3.2 against 2.4 ms, a third more.
    """
    shrink, expand = a.float().T, b.float().T
    if x.dtype == torch.float32:
        y.addmm_(x @ shrink, expand)
        return
    num_rows = max(1, _BLOCK_VALUES // max(x.shape[1], y.shape[1]))
    for start in range(0, len(x), num_rows):
        block = y[start : start + num_rows]
        block.copy_(block.float().addmm_(x[start : start + num_rows].float() @ shrink, expand))
