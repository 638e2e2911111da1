"""y += B (A x), each row of x with the adapter in its own slot. It serves hundreds of adapters in one decoding step.

vLLM's CPU path copies and converts the whole A and B of every row's slot, module by module. Here a row's A and B are
read once and in place. Each thread takes a row. If there are more threads than rows, each takes some columns of a row
and computes h = A x again. A is then in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from regrad_vllm.adapt.loops.memory import FLOAT_TYPES, i64_array, prefetch
from regrad_vllm.adapt.loops.team import num_threads, on_all_threads, thread_index

MAX_RANK = 512
_COLUMNS = 4096  # columns of y summed at a time, so that they fit into one core's cache
_HEAD = 8
_NUM_ROWS, _ROWS, _SLOTS, _X, _X_STRIDE, _Y, _Y_STRIDE, _NUM_SLICES = range(_HEAD)
# The number of parameters of each slice. They follow the head.
_SLICE = 8
_A, _A_STRIDE, _B, _B_STRIDE, _RANK, _INPUTS, _OUTPUTS, _OFFSET = range(_SLICE)


# Both loops take four rows of A or B at a time. So x and the sums are read and written once for four rows. The
# compiler sees that indices into a slice are in order, and makes vector instructions of the loops.


@cache
def _ahead(weight_size: int) -> Any:
    @numba.njit(fastmath=True, nogil=True)
    def ahead(address: Any, num_bytes: Any) -> None:
        """Prefetches the next rows. In two-byte types rows are too short for the processor's own prefetching."""
        if weight_size == 2:
            for offset in range(0, num_bytes, 64):
                prefetch(address + offset)

    return ahead


@cache
def _shrink(values: torch.dtype, weights: torch.dtype) -> Any:
    load_value, load_weight = FLOAT_TYPES[values].load, FLOAT_TYPES[weights].load
    weight_size, ahead = weights.itemsize, _ahead(weights.itemsize)

    @numba.njit(fastmath=True, nogil=True)
    def shrink(x: Any, a: Any, a_address: Any, h: Any, rank: Any, inputs: Any) -> None:
        """h = A x"""
        for i in range(0, rank - 3, 4):
            ahead(a_address + (i + 8) * inputs * weight_size, 4 * inputs * weight_size)
            a0, a1 = a[i * inputs : (i + 1) * inputs], a[(i + 1) * inputs : (i + 2) * inputs]
            a2, a3 = a[(i + 2) * inputs : (i + 3) * inputs], a[(i + 3) * inputs : (i + 4) * inputs]
            h0 = h1 = h2 = h3 = np.float32(0)
            for j in range(inputs):
                value = load_value(x[j])
                h0 += load_weight(a0[j]) * value
                h1 += load_weight(a1[j]) * value
                h2 += load_weight(a2[j]) * value
                h3 += load_weight(a3[j]) * value
            h[i], h[i + 1], h[i + 2], h[i + 3] = h0, h1, h2, h3
        for i in range(rank // 4 * 4, rank):
            a0 = a[i * inputs : (i + 1) * inputs]
            total = np.float32(0)
            for j in range(inputs):
                total += load_weight(a0[j]) * load_value(x[j])
            h[i] = total

    return shrink


@cache
def _expand(values: torch.dtype, weights: torch.dtype) -> Any:
    load_value, store_value, load_weight = (
        FLOAT_TYPES[values].load,
        FLOAT_TYPES[values].store,
        FLOAT_TYPES[weights].load,
    )
    weight_size, ahead = weights.itemsize, _ahead(weights.itemsize)

    @numba.njit(fastmath=True, nogil=True)
    def expand(y: Any, b: Any, b_address: Any, h: Any, part: Any, rank: Any, outputs: Any, start: Any, n: Any) -> None:
        """y[start : start + n] += B h"""
        block = y[start : start + n]
        for j in range(n):
            part[j] = load_value(block[j])
        for i in range(0, rank - 3, 4):
            ahead(b_address + (i + 8) * outputs * weight_size, 4 * outputs * weight_size)
            b0 = b[i * outputs + start : i * outputs + start + n]
            b1 = b[(i + 1) * outputs + start : (i + 1) * outputs + start + n]
            b2 = b[(i + 2) * outputs + start : (i + 2) * outputs + start + n]
            b3 = b[(i + 3) * outputs + start : (i + 3) * outputs + start + n]
            h0, h1, h2, h3 = h[i], h[i + 1], h[i + 2], h[i + 3]
            for j in range(n):
                part[j] += (h0 * load_weight(b0[j]) + h1 * load_weight(b1[j])) + (
                    h2 * load_weight(b2[j]) + h3 * load_weight(b3[j])
                )
        for i in range(rank // 4 * 4, rank):
            b0 = b[i * outputs + start : i * outputs + start + n]
            factor = h[i]
            for j in range(n):
                part[j] += factor * load_weight(b0[j])
        for j in range(n):
            block[j] = store_value(part[j])

    return expand


@cache
def _columns(values: torch.dtype, weights: torch.dtype) -> Any:
    """The compiled loop over some columns of one row of y. x and y have the type ``values``, A and B ``weights``."""
    value_array, weight_array = FLOAT_TYPES[values].array, FLOAT_TYPES[weights].array
    size, weight_size = values.itemsize, weights.itemsize
    shrink, expand = _shrink(values, weights), _expand(values, weights)

    @numba.njit(fastmath=True, nogil=True)
    def columns(p: Any, s: Any, row: Any, slot: Any, first: Any, last: Any, h: Any, part: Any) -> None:
        """Columns first..last of one row's y, for the slice whose parameters start at s."""
        rank, inputs, outputs = p[s + _RANK], p[s + _INPUTS], p[s + _OUTPUTS]
        x = value_array(p[_X] + row * p[_X_STRIDE] * size, inputs)
        a = weight_array(p[s + _A] + slot * p[s + _A_STRIDE] * weight_size, rank * inputs)
        b = weight_array(p[s + _B] + slot * p[s + _B_STRIDE] * weight_size, rank * outputs)
        y = value_array(p[_Y] + (row * p[_Y_STRIDE] + p[s + _OFFSET]) * size, outputs)
        shrink(x, a, p[s + _A] + slot * p[s + _A_STRIDE] * weight_size, h, rank, inputs)
        for start in range(first, last, _COLUMNS):
            expand(
                y,
                b,
                p[s + _B] + slot * p[s + _B_STRIDE] * weight_size,
                h,
                part,
                rank,
                outputs,
                start,
                min(_COLUMNS, last - start),
            )

    return columns


@cache
def _body(values: torch.dtype, weights: torch.dtype) -> int:
    """The address of the compiled function that each thread runs."""
    columns = _columns(values, weights)

    @numba.cfunc(types.void(types.voidptr))
    def body(data: Any) -> None:
        head = numba.carray(data, (_HEAD,), np.int64)
        p = numba.carray(data, (_HEAD + _SLICE * head[_NUM_SLICES],), np.int64)
        rows, slots = i64_array(p[_ROWS], p[_NUM_ROWS]), i64_array(p[_SLOTS], p[_NUM_ROWS])
        threads = num_threads()
        parts = max(1, threads // p[_NUM_ROWS])  # parts of a row
        h = np.empty(MAX_RANK, np.float32)
        part = np.empty(_COLUMNS, np.float32)
        for item in range(thread_index(), p[_NUM_ROWS] * parts, threads):
            index, which = item // parts, item % parts
            for number in range(p[_NUM_SLICES]):
                s = _HEAD + _SLICE * number
                outputs = p[s + _OUTPUTS]
                columns(
                    p, s, rows[index], slots[index], outputs * which // parts, outputs * (which + 1) // parts, h, part
                )

    return int(body.address)


def supports(values: torch.dtype, weights: torch.dtype, rank: int) -> bool:
    """Whether ``LoraRows`` supports these types and this rank."""
    return values in FLOAT_TYPES and weights in FLOAT_TYPES and rank <= MAX_RANK


def compile_for(values: torch.dtype, weights: torch.dtype) -> None:
    """Compiles the loop for x and y in ``values``, A and B in ``weights``. Otherwise its first call compiles it."""
    _body(values, weights)


class LoraRows:
    """The A and B of one module, stacked by slot, with the loop that applies them."""

    def __init__(self, a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor], output_slices: Sequence[int]) -> None:
        """a_stacked: (slots, 1, rank, in) for each slice. b_stacked: (slots, 1, out, rank) for each slice.

        Each slot's A must be C-contiguous, and so must each slot's B transposed, (rank, out). ValueError otherwise.
        """
        offset = 0
        rows = []
        for a, b, outputs in zip(a_stacked, b_stacked, output_slices, strict=True):
            rank, inputs = a.shape[2:]
            if a.stride()[2:] != (inputs, 1) or b.stride()[2:] != (1, outputs) or b.shape[2:] != (outputs, rank):
                raise ValueError(f"A must be (rank, in) and B (rank, out) in memory, got {a.stride()}, {b.stride()}")
            rows.append([a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), rank, inputs, outputs, offset])
            offset += outputs
        self._weights = a_stacked[0].dtype
        self._parameters = np.zeros(_HEAD + _SLICE * len(rows), np.int64)
        self._parameters[_HEAD:] = np.array(rows, np.int64).reshape(-1)
        self._parameters[_NUM_SLICES] = len(rows)
        self._address = self._parameters.ctypes.data
        self._kept = (tuple(a_stacked), tuple(b_stacked))  # keeps the memory at the addresses alive

    def add(self, y: Tensor, x: Tensor, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """y[row] += B[slot] (A[slot] x[row]), in place, summed in float32, for each of ``rows`` and its slot.

        y: (tokens, all outputs). x: (tokens, in). The rows of both are contiguous. Not thread-safe.
        """
        p = self._parameters
        p[_NUM_ROWS], p[_ROWS], p[_SLOTS] = len(rows), rows.ctypes.data, slots.ctypes.data
        p[_X], p[_X_STRIDE], p[_Y], p[_Y_STRIDE] = x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)
        on_all_threads(_body(x.dtype, self._weights), self._address)
