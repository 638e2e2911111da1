"""LoRA in vLLM's linear layers on CPUs: φ* and documents by our kernels, operators' own adapters by two products.

This replaces vLLM's kernels (``lora/ops/torch_ops``), which copy and convert the whole A and B of every row. Those
also give a row without an adapter (index −1) the adapter of the last slot. The rest of vLLM's wrapper, the bookkeeping
over rows and slots, is used unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from regrad_vllm.serve.kernels.batch import BatchDocuments
from regrad_vllm.serve.kernels.layer import DocumentsLayer
from regrad_vllm.serve.recipe import ADAPTER_ID

_BLOCK_VALUES = 2**17  # of x or y that are widened to float32 at a time


class DocumentsPunicaWrapper(PunicaWrapperCPU):
    """The wrapper that vLLM makes in each worker (``CpuPlatform.get_punica_wrapper``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers: Mapping[int, DocumentsLayer] = {}  # by the address of a layer's first stacked A
        self.batch: BatchDocuments | None = None  # the documents of the step
        self._num_rows = 0
        self._operators: list[tuple[int, Tensor | slice]] = []  # slots of operators' adapters, each with its rows

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Called when the rows' adapters or their slots have changed. All our requests are one adapter to vLLM."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = self.token_lora_indices.numpy()
        self._num_rows = len(slots)
        ours = lora_index_to_id.index(ADAPTER_ID) if ADAPTER_ID in lora_index_to_id else -1
        self._operators = [
            (int(slot), _rows(np.flatnonzero(slots == slot))) for slot in np.unique(slots) if slot not in (-1, ours)
        ]

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
        """Adds to each row of y what its adapter makes of x. Rows without an adapter stay as they are."""
        # torch.compile would not see the loops' writes, so this must not run inside it. vLLM doesn't compile with LoRA
        # on CPUs, and ``engine_flags.check_engine_settings`` refuses a setting that does.
        if x.shape[0] != self._num_rows:
            raise ValueError(f"LoRA's rows must be the batch's {self._num_rows}, got {x.shape[0]}")
        if self.batch is not None:
            layer = self.layers.get(lora_a_stacked[0].data_ptr())
            if layer is not None:
                layer.add(y, x, self.batch)
        for slot, rows in self._operators:
            offset = 0
            for a, b, outputs in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                _add_products(y[:, offset : offset + outputs], x, a[slot, 0], b[slot, 0], rows)
                offset += outputs


def _rows(indices: NDArray[np.int64]) -> Tensor | slice:
    """Rows as a slice where they are successive."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else torch.from_numpy(indices)


def _add_products(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor | slice) -> None:
    """y[rows] += B (A x[rows]), in float32 and rounded once.

    So an answer does not depend on the chunks that its prompt is computed in.
    y: (rows, out), x: (rows, in), a: (rank, in), b: (out, rank).

    The rows are widened in blocks, so that a block is still in the CPU's cache when it is rounded.
    """
    shrink, expand = a.float().T, b.float().T
    own, sums = x[rows], y[rows]
    size = max(1, _BLOCK_VALUES // max(x.shape[1], y.shape[1]))
    for start in range(0, len(own), size):
        block = sums[start : start + size]
        block.copy_(block.float().addmm_(own[start : start + size].float() @ shrink, expand))
    if not isinstance(rows, slice):  # then ``sums`` is a copy
        y[rows] = sums
