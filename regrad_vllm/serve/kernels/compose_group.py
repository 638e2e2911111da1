"""A dense A and B for many rows of the same documents, in panels as φ* itself.

A = A* + Σ c P Q and B = B* + Σ c U V. Both are products again. A block of A's inputs has the codes as its rows and P as
its panel. A panel of B has V as its rows and the codes as its panel. Each thread takes some blocks of 128 inputs or
columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from bank_service.wire.codecs.factors import BLOCK, CODES, COUNT, LONG, SCALES, SHORT, SHORTS, STRIDE
from regrad_vllm.serve.kernels.code_loops import form_address, load_bf16
from regrad_vllm.serve.kernels.panel_loops import product
from regrad_vllm.serve.kernels.raw_memory import f32_array, i8_array, i32_array, i64_array, u16_array
from regrad_vllm.serve.kernels.torch_threads import num_threads, thread_index
from regrad_vllm.serve.kernels.vector_code import LANES

# The parameters: a head, then a part for each of the two tensors of each slice.
HEAD = 8
NUM_DOCUMENTS, ADDRESSES, COEFFICIENTS, FORMS, TABLES, BITS, NUM_TENSORS, NUM_PARTS = range(HEAD)
PART = 7
SOURCE, TARGET, TENSOR, IS_B, RANK, SIZE, FIRST = range(PART)  # SIZE: of the long side; FIRST: its first index


@numba.njit(nogil=True)
def _dequantized(payload: Any, bits: Any, form: Any, component: Any, block: Any, out: Any) -> None:
    """scale · code of one block of a component. Zeros after the tensor's end."""
    all_blocks = (form[LONG] + BLOCK - 1) // BLOCK
    scale = load_bf16(u16_array(payload + form[SCALES], form[COUNT] * all_blocks)[component * all_blocks + block])
    size = min(BLOCK, form[LONG] - block * BLOCK)
    codes = i8_array(payload + form[CODES] + component * form[STRIDE] + block * (16 * bits), size)
    if bits == 4:
        for j in range(BLOCK // 2):
            pair = np.uint8(codes[j])
            out[j] = scale * np.float32(np.int32(pair & 15) - 8)
            out[j + BLOCK // 2] = scale * np.float32(np.int32(pair >> 4) - 8)
        return
    for j in range(size):
        out[j] = scale * np.float32(codes[j])
    for j in range(size, BLOCK):
        out[j] = np.float32(0)


@numba.njit(nogil=True)
def _factors(p: Any, tensor: Any, block: Any, long: Any, short: Any) -> Any:
    """All components of all documents, for one block. long: (components, 128). short: (components, rank), times c."""
    if len(long) == 0:
        return
    addresses, coefficients = i64_array(p[ADDRESSES], p[NUM_DOCUMENTS]), f32_array(p[COEFFICIENTS], p[NUM_DOCUMENTS])
    forms = i32_array(p[FORMS], p[NUM_DOCUMENTS])
    place = 0
    for document in range(p[NUM_DOCUMENTS]):
        form = i64_array(form_address(p[TABLES], p[NUM_TENSORS], forms[document], tensor), 7)
        bits = i64_array(p[BITS], forms[document] + 1)[forms[document]]
        shorts = u16_array(addresses[document] + form[SHORTS], form[COUNT] * form[SHORT])
        for c in range(form[COUNT]):
            _dequantized(addresses[document], bits, form, c, block, long[place])
            for j in range(form[SHORT]):
                short[place, j] = coefficients[document] * load_bf16(shorts[c * form[SHORT] + j])
            for j in range(form[SHORT], short.shape[1]):
                short[place, j] = np.float32(0)
            place += 1


@numba.njit(nogil=True)
def _num_components(p: Any, tensor: Any) -> Any:
    forms, total = i32_array(p[FORMS], p[NUM_DOCUMENTS]), 0
    if tensor >= 0:
        for document in range(p[NUM_DOCUMENTS]):
            total += i64_array(form_address(p[TABLES], p[NUM_TENSORS], forms[document], tensor), 7)[COUNT]
    return total


@cache
def _inputs() -> Any:
    multiply = product()

    @numba.njit(nogil=True)
    def compose_inputs(p: Any, s: Any, block: Any) -> None:
        """A block of A's inputs, for all ranks."""
        depth, rank, size = _num_components(p, p[s + TENSOR]), p[s + RANK], p[s + SIZE]
        panels = (rank + LANES - 1) // LANES
        long, short = np.empty((depth, BLOCK), np.float32), np.empty((depth, panels * LANES), np.float32)
        _factors(p, p[s + TENSOR], p[s + FIRST] // BLOCK + block, long, short)
        lead = p[s + FIRST] % BLOCK
        left, right = max(block * BLOCK, lead), min((block + 1) * BLOCK, lead + size)
        x, w = np.empty((right - left, depth), np.float32), np.empty((panels, depth, LANES), np.float32)
        for c in range(depth):
            for j in range(left, right):
                x[j - left, c] = long[c, j - block * BLOCK]
            for j in range(panels * LANES):
                w[j // LANES, c, j % LANES] = short[c, j]
        place = (left - lead) * 4 * LANES
        multiply(
            right - left, x.ctypes.data, 4 * depth, w.ctypes.data, depth, panels, p[s + SOURCE] + place,
            p[s + TARGET] + place, 4 * LANES, 4 * LANES * size,
        )  # fmt: skip

    return compose_inputs


@cache
def _outputs() -> Any:
    multiply = product()

    @numba.njit(nogil=True)
    def compose_outputs(p: Any, s: Any, block: Any) -> None:
        """A block of B's columns, for all ranks."""
        depth, rank = _num_components(p, p[s + TENSOR]), p[s + RANK]
        long, short = np.empty((depth, BLOCK), np.float32), np.empty((depth, rank), np.float32)
        _factors(p, p[s + TENSOR], p[s + FIRST] // BLOCK + block, long, short)
        right = min(BLOCK, p[s + FIRST] % BLOCK + p[s + SIZE] - block * BLOCK)
        panels = (right + LANES - 1) // LANES
        x, w = np.empty((rank, depth), np.float32), np.empty((panels, depth, LANES), np.float32)
        for c in range(depth):
            for j in range(rank):
                x[j, c] = short[c, j]
            for j in range(panels * LANES):
                w[j // LANES, c, j % LANES] = long[c, j]
        place = block * BLOCK * rank * 4
        multiply(
            rank, x.ctypes.data, 4 * depth, w.ctypes.data, depth, panels, p[s + SOURCE] + place,
            p[s + TARGET] + place, 4 * LANES, 4 * LANES * rank,
        )  # fmt: skip

    return compose_outputs


@cache
def body() -> int:
    """The address of the compiled function that each thread runs."""
    compose_inputs, compose_outputs = _inputs(), _outputs()

    @numba.cfunc(types.void(types.voidptr))
    def run(data: Any) -> None:
        head = numba.carray(data, (HEAD,), np.int64)
        p = numba.carray(data, (HEAD + PART * head[NUM_PARTS],), np.int64)
        item, threads = thread_index(), num_threads()
        before = 0
        for number in range(p[NUM_PARTS]):
            s = HEAD + PART * number
            blocks = (p[s + FIRST] % BLOCK + p[s + SIZE] + BLOCK - 1) // BLOCK
            while item < before + blocks:
                if p[s + IS_B]:
                    compose_outputs(p, s, item - before)
                else:
                    compose_inputs(p, s, item - before)
                item += threads
            before += blocks

    return int(run.address)
