"""One of vLLM's linear layers with φ* and the documents of each row, on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bank_service.wire.codecs.factors import BLOCK
from regrad_vllm.serve.kernels import compose_group as compose
from regrad_vllm.serve.kernels import row_loops as rows
from regrad_vllm.serve.kernels.batch import BatchDocuments, Forms
from regrad_vllm.serve.kernels.layer_slice import LayerSlice
from regrad_vllm.serve.kernels.panel_loops import KINDS
from regrad_vllm.serve.kernels.torch_threads import on_all_threads
from regrad_vllm.serve.kernels.vector_code import LANES

_KIND = {dtype: index for index, dtype in enumerate(KINDS)}


class DocumentsLayer:
    """The φ* of one layer, copied into panels of 16 columns, with the loops that apply it and the documents."""

    def __init__(self, slices: Sequence[LayerSlice], scaling: float, forms: Forms) -> None:
        """``slices``: of the layer, in the order of y's columns. ``scaling``: lora_alpha / R.

        ValueError if the slices' inputs are not the same.
        """
        self._forms, self._outputs = forms, sum(part.outputs for part in slices)
        ours, weights, offset = [], [], 0
        for part in slices:
            if part.a is not None and part.b is not None:
                ours.append((part, offset))
                weights.append((part.a, part.b))
            offset += part.outputs
        self._inputs = _only("inputs", {a.shape[1] for a, _ in weights})
        first_input = _only("first input", {part.first_input for part, _ in ours if part.tensor_a >= 0})
        p = self._parameters = np.zeros(rows.HEAD + rows.SLICE * len(ours), np.int64)
        p[rows.NUM_TENSORS], p[rows.INPUTS], p[rows.NUM_SLICES] = forms.tables.shape[1], self._inputs, len(ours)
        p[rows.LEAD], p[rows.FIRST_BLOCK] = first_input % BLOCK, first_input // BLOCK
        p[rows.SCALING : rows.SCALING + 1].view(np.float32)[0] = scaling
        self._panels = []
        for number, ((part, offset), (a, b)) in enumerate(zip(ours, weights, strict=True)):
            lead = part.first_output % BLOCK if part.tensor_b >= 0 else 0
            both = _panels(a), _panels(b, lead)
            self._panels.append(both)
            s = rows.HEAD + rows.SLICE * number
            p[s : s + rows.SLICE] = (
                both[0].data_ptr(), both[1].data_ptr(), a.shape[0], part.outputs, offset, part.tensor_a, part.tensor_b,
                lead, part.first_output // BLOCK,
            )  # fmt: skip
        self._address = p.ctypes.data
        self._composed: _Composed | None = None

    def add(self, y: Tensor, x: Tensor, batch: BatchDocuments) -> None:
        """y[row] += s (B* h + Σ c U (V h)) with h = A* x[row] + Σ c P (Q x[row]), in place, for each ReGrad row.

        y: (tokens, all outputs), x: (tokens, inputs), of one of the types float32, bfloat16 and float16, their rows
        contiguous. Sums are float32, y is rounded once. Not thread-safe. ValueError for other shapes or types.
        """
        p = self._parameters
        if not p[rows.NUM_SLICES]:
            return
        if (
            x.shape != (batch.num_rows, self._inputs)
            or y.shape != (batch.num_rows, self._outputs)
            or x.dtype != y.dtype
            or x.dtype not in _KIND
            or x.stride(1) != 1
            or y.stride(1) != 1
        ):
            self._refuse(y, x, batch)
        p[rows.BATCH : rows.Y_STRIDE + 1] = (
            batch.address, *self._forms.addresses, _KIND[x.dtype], x.itemsize, x.data_ptr(), x.stride(0), y.data_ptr(),
            y.stride(0),
        )  # fmt: skip
        num_others, others = batch.others
        if num_others:
            p[rows.NUM_INDICES], p[rows.INDICES] = num_others, others
            on_all_threads(rows.body(), self._address)
        for indices in batch.grouped[0]:
            if self._composed is None:
                self._composed = _Composed(p)
            self._composed.add(p, batch, indices)

    def _refuse(self, y: Tensor, x: Tensor, batch: BatchDocuments) -> None:
        raise ValueError(
            f"x and y must be contiguous rows of {self._inputs} and {self._outputs} values of one float type for the "
            f"batch's {batch.num_rows} tokens, got {tuple(x.shape)} of {x.dtype} and {tuple(y.shape)} of {y.dtype}"
        )


def compile_loops() -> None:
    """Compiles all loops. Otherwise the first calls do, which takes seconds."""
    rows.body()
    compose.body()


def _panels(matrix: Tensor, lead: int = 0) -> Tensor:
    """(columns, depth) → float32 (panels, depth, 16), with ``lead`` columns of zeros before, and zeros after."""
    columns, depth = matrix.shape
    padded = torch.zeros(-(-(lead + columns) // LANES) * LANES, depth)
    padded[lead : lead + columns] = matrix
    return padded.view(-1, LANES, depth).transpose(1, 2).contiguous()


def _only(name: str, found: set[int]) -> int:
    """The one value that all slices have, 0 if there is no slice."""
    if len(found) > 1:
        raise ValueError(f"all slices must have the same {name}, got {sorted(found)}")
    return found.pop() if found else 0


class _Composed:
    """The dense A and B of a layer for one group of rows at a time."""

    def __init__(self, parameters: NDArray[np.int64]) -> None:
        """``parameters``: of the layer."""
        self._rows = parameters.copy()
        num_parts = 2 * int(parameters[rows.NUM_SLICES])
        self._compose = np.zeros(compose.HEAD + compose.PART * num_parts, np.int64)
        self._compose[compose.NUM_PARTS] = num_parts
        self._compose[compose.NUM_TENSORS] = parameters[rows.NUM_TENSORS]
        self._panels = []
        for number in range(num_parts // 2):
            own = self._rows[rows.HEAD + rows.SLICE * number :][: rows.SLICE]
            a, b, rank, outputs, _, tensor_a, tensor_b, lead, first_block = own.tolist()
            inputs, first_input = int(parameters[rows.INPUTS]), 0
            if tensor_a >= 0:
                first_input = int(parameters[rows.LEAD] + BLOCK * parameters[rows.FIRST_BLOCK])
            both = (
                torch.empty(-(-rank // LANES) * LANES * inputs),
                torch.empty(-(-(lead + outputs) // LANES) * LANES * rank),
            )
            self._panels.append(both)
            own[[rows.A, rows.B, rows.TENSOR_A, rows.TENSOR_B]] = (
                both[0].data_ptr(),
                both[1].data_ptr(),
                -1,
                -1,
            )
            self._compose[compose.HEAD + 2 * compose.PART * number :][: 2 * compose.PART] = (
                a, both[0].data_ptr(), tensor_a, 0, rank, inputs, first_input,
                b, both[1].data_ptr(), tensor_b, 1, rank, outputs, lead + BLOCK * first_block,
            )  # fmt: skip

    def add(self, parameters: NDArray[np.int64], batch: BatchDocuments, indices: NDArray[np.int64]) -> None:
        """Composes for the documents of these rows, then adds to the rows. ``parameters``: of the layer's call."""
        first, last = batch.first[indices[0] : indices[0] + 2].tolist()
        p = self._compose
        p[compose.NUM_DOCUMENTS] = last - first
        p[compose.ADDRESSES], p[compose.COEFFICIENTS], p[compose.FORMS] = (
            array.ctypes.data + array.itemsize * first for array in (batch.addresses, batch.coefficients, batch.forms)
        )
        p[compose.TABLES], p[compose.BITS] = parameters[rows.TABLES], parameters[rows.BITS]
        on_all_threads(compose.body(), p.ctypes.data)
        self._rows[: rows.HEAD] = parameters[: rows.HEAD]
        self._rows[rows.NUM_INDICES], self._rows[rows.INDICES] = len(indices), indices.ctypes.data
        on_all_threads(rows.body(), self._rows.ctypes.data)
