"""The loop over rows: φ* as a product of several rows with panels of 16 columns, then each row's own documents.

x of some rows is widened to float32, then h = A* x + Σ c P (Q x), then y block by block of columns. Each thread takes
some rows. If there are more threads than rows, each takes some blocks of a row's columns and computes h again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from bank_service.wire.codecs.factors import BLOCK, COUNT
from regrad_vllm.serve.kernels import code_loops
from regrad_vllm.serve.kernels.panel_loops import add_rounded, product, widen
from regrad_vllm.serve.kernels.raw_memory import f32_array, i32_array, i64_array
from regrad_vllm.serve.kernels.torch_threads import num_threads, thread_index
from regrad_vllm.serve.kernels.vector_code import LANES, TILE_ROWS

ITEM_ROWS = 32  # rows that one thread takes at a time
_WIDTH = 4 * BLOCK  # columns of y summed at a time, so that they and their part of B fit into one core's cache

# The parameters: a head, then a part for each slice.
HEAD = 17
(
    NUM_INDICES, INDICES, BATCH, TABLES, BITS, KIND, VALUE_BYTES, X, X_STRIDE, Y, Y_STRIDE, NUM_TENSORS, INPUTS, LEAD,
    FIRST_BLOCK, SCALING, NUM_SLICES,
) = range(HEAD)  # fmt: skip
SLICE = 9
A, B, RANK, OUTPUTS, OFFSET, TENSOR_A, TENSOR_B, LEAD_OUT, FIRST_BLOCK_OUT = range(SLICE)
# The parameters of ``BatchDocuments``.
_ROWS, _FIRST, _ADDRESSES, _COEFFICIENTS, _FORMS = range(5)
_DOCUMENT = 3
_PAYLOAD, _BITS, _FORM = range(_DOCUMENT)


@numba.njit(nogil=True)
def _look_up(p: Any, indices: Any) -> Any:
    """firsts (rows + 1,) of each row's documents, then the documents and their coefficients."""
    batch = i64_array(p[BATCH], 5)
    first = i64_array(batch[_FIRST], indices[-1] + 2)
    num_documents = first[indices[-1] + 1]
    addresses, all_coefficients = (
        i64_array(batch[_ADDRESSES], num_documents),
        f32_array(batch[_COEFFICIENTS], num_documents),
    )
    forms = i32_array(batch[_FORMS], num_documents)
    firsts = np.zeros(len(indices) + 1, np.int64)
    for i in range(len(indices)):
        firsts[i + 1] = firsts[i] + first[indices[i] + 1] - first[indices[i]]
    documents, coefficients = np.empty((firsts[-1], _DOCUMENT), np.int64), np.empty(firsts[-1], np.float32)
    place = 0
    for i in range(len(indices)):
        for document in range(first[indices[i]], first[indices[i] + 1]):
            documents[place, _PAYLOAD] = addresses[document]
            documents[place, _BITS] = i64_array(p[BITS], forms[document] + 1)[forms[document]]
            documents[place, _FORM] = code_loops.form_address(p[TABLES], p[NUM_TENSORS], forms[document], 0)
            coefficients[place] = all_coefficients[document]
            place += 1
    return firsts, documents, coefficients


@cache
def _hidden() -> Any:
    multiply, add_inputs = product(), code_loops.add_inputs()

    @numba.njit(nogil=True)
    def hidden(p: Any, s: Any, x: Any, h: Any, firsts: Any, documents: Any, coefficients: Any) -> None:
        """h = s (A* x + Σ c P (Q x)) of each row."""
        num_rows, stride = h.shape[0], 4 * h.shape[1]
        multiply(
            num_rows, x.ctypes.data + 4 * p[LEAD], 4 * x.shape[1], p[s + A], p[INPUTS], h.shape[1] // LANES, 0,
            h.ctypes.data, stride, 4 * LANES,
        )  # fmt: skip
        if p[s + TENSOR_A] >= 0:
            for i in range(num_rows):
                for k in range(firsts[i], firsts[i + 1]):
                    form = code_loops.form_address(documents[k, _FORM], 0, 0, p[s + TENSOR_A])
                    add_inputs(
                        documents[k, _PAYLOAD], documents[k, _BITS], form, coefficients[k], x[i].ctypes.data,
                        h[i].ctypes.data, p[FIRST_BLOCK], x.shape[1] // BLOCK,
                    )  # fmt: skip
        scaling = f32_array(p.ctypes.data + 8 * SCALING, 1)[0]
        for i in range(num_rows):
            for j in range(h.shape[1]):
                h[i, j] *= scaling

    return hidden


@cache
def _columns() -> Any:
    multiply, add_to, add_outputs = product(), add_rounded(), code_loops.add_outputs()

    @numba.njit(nogil=True)
    def columns(
        p: Any, s: Any, indices: Any, h: Any, first_block: Any, last_block: Any, firsts: Any, documents: Any,
        places: Any, weights: Any,
    ) -> None:  # fmt: skip
        """y += B* h + Σ U (c V h) of each row, in some blocks of the slice's columns."""
        num_rows, rank = len(indices), p[s + RANK]
        rows = i64_array(i64_array(p[BATCH], 5)[_ROWS], indices[-1] + 1)
        part, work = np.empty((TILE_ROWS, _WIDTH), np.float32), np.empty(len(weights), np.float32)
        tiles = (num_rows + TILE_ROWS - 1) // TILE_ROWS
        end = p[s + LEAD_OUT] + p[s + OUTPUTS]
        for block in range(first_block, last_block, _WIDTH // BLOCK):
            blocks = min(last_block - block, _WIDTH // BLOCK)
            left, right = block * BLOCK, min((block + blocks) * BLOCK, end)
            start = max(left, p[s + LEAD_OUT])
            for number in range(tiles):
                first, last = num_rows * number // tiles, num_rows * (number + 1) // tiles
                multiply(
                    last - first, h[first].ctypes.data, 4 * h.shape[1], p[s + B] + left * rank * 4, rank,
                    (right - left + LANES - 1) // LANES, 0, part.ctypes.data, 4 * _WIDTH, 4 * LANES,
                )  # fmt: skip
                for i in range(first, last):
                    own = part.ctypes.data + (i - first) * 4 * _WIDTH
                    for k in range(firsts[i], firsts[i + 1]):
                        form = code_loops.form_address(documents[k, _FORM], 0, 0, p[s + TENSOR_B])
                        add_outputs(
                            documents[k, _PAYLOAD], documents[k, _BITS], form,
                            weights.ctypes.data + 4 * places[k], work.ctypes.data, own, p[s + FIRST_BLOCK_OUT] + block,
                            blocks,
                        )  # fmt: skip
                    column = rows[indices[i]] * p[Y_STRIDE] + p[s + OFFSET] + start - p[s + LEAD_OUT]
                    add_to(p[KIND], p[Y] + column * p[VALUE_BYTES], right - start, own + 4 * (start - left))

    return columns


@cache
def _slice() -> Any:
    fetch, weigh, hidden, columns = code_loops.fetch(), code_loops.weights(), _hidden(), _columns()

    @numba.njit(nogil=True)
    def add_slice(
        p: Any, s: Any, indices: Any, x: Any, firsts: Any, documents: Any, coefficients: Any, first_block: Any,
        last_block: Any,
    ) -> None:  # fmt: skip
        """Some blocks of a slice's columns, for some rows. x: float32 (rows, whole blocks)."""
        num_rows, places = len(indices), np.zeros(len(documents) + 1, np.int64)
        for k in range(len(documents)):  # while memory answers, A* x is computed
            payload, bits = documents[k, _PAYLOAD], documents[k, _BITS]
            if p[s + TENSOR_A] >= 0:
                form = code_loops.form_address(documents[k, _FORM], 0, 0, p[s + TENSOR_A])
                fetch(payload, bits, form, p[FIRST_BLOCK], x.shape[1] // BLOCK)
            if p[s + TENSOR_B] >= 0:
                form = code_loops.form_address(documents[k, _FORM], 0, 0, p[s + TENSOR_B])
                blocks = min(last_block - first_block, _WIDTH // BLOCK)
                fetch(payload, bits, form, p[s + FIRST_BLOCK_OUT] + first_block, blocks)
                places[k + 1] = places[k] + i64_array(form, 7)[COUNT]
        h = np.empty((num_rows, (p[s + RANK] + LANES - 1) // LANES * LANES), np.float32)
        hidden(p, s, x, h, firsts, documents, coefficients)
        weights = np.empty(places[-1], np.float32)
        if p[s + TENSOR_B] < 0:
            firsts = np.zeros(num_rows + 1, np.int64)
        for i in range(num_rows):
            for k in range(firsts[i], firsts[i + 1]):
                form = code_loops.form_address(documents[k, _FORM], 0, 0, p[s + TENSOR_B])
                place = weights.ctypes.data + 4 * places[k]
                weigh(documents[k, _PAYLOAD], form, coefficients[k], h[i].ctypes.data, place)
        columns(p, s, indices, h, first_block, last_block, firsts, documents, places, weights)

    return add_slice


@numba.njit(inline="always")
def _blocks_of(p: Any, s: Any) -> Any:
    """Blocks of a slice's columns, its lead of empty columns included."""
    return (p[s + LEAD_OUT] + p[s + OUTPUTS] + BLOCK - 1) // BLOCK


@cache
def body() -> int:
    """The address of the compiled function that each thread runs."""
    to_floats, add_slice = widen(), _slice()

    @numba.cfunc(types.void(types.voidptr))
    def run(data: Any) -> None:
        head = numba.carray(data, (HEAD,), np.int64)
        p = numba.carray(data, (HEAD + SLICE * head[NUM_SLICES],), np.int64)
        indices = i64_array(p[INDICES], p[NUM_INDICES])
        rows = i64_array(i64_array(p[BATCH], 5)[_ROWS], indices[-1] + 1)
        threads, num_rows = num_threads(), p[NUM_INDICES]
        total = 0  # blocks of all slices
        for number in range(p[NUM_SLICES]):
            total += _blocks_of(p, HEAD + SLICE * number)
        parts = min(total, max(1, threads // num_rows))  # parts of a row's columns
        pieces = num_rows
        if num_rows > threads:
            pieces = (num_rows + ITEM_ROWS - 1) // ITEM_ROWS
            pieces = min(num_rows, (pieces + threads - 1) // threads * threads)
        width = (p[LEAD] + p[INPUTS] + BLOCK - 1) // BLOCK * BLOCK
        x = np.zeros(((num_rows + pieces - 1) // pieces, width), np.float32)  # zero around the inputs
        for item in range(thread_index(), pieces * parts, threads):
            piece, which = item // parts, item % parts
            own = indices[num_rows * piece // pieces : num_rows * (piece + 1) // pieces]
            for i in range(len(own)):
                place = p[X] + rows[own[i]] * p[X_STRIDE] * p[VALUE_BYTES]
                to_floats(p[KIND], place, p[INPUTS], x[i].ctypes.data + 4 * p[LEAD])
            firsts, documents, coefficients = _look_up(p, own)
            start, stop, before = total * which // parts, total * (which + 1) // parts, 0
            for number in range(p[NUM_SLICES]):
                s = HEAD + SLICE * number
                blocks = _blocks_of(p, s)
                low, high = max(start - before, 0), min(stop - before, blocks)
                if low < high:
                    add_slice(p, s, own, x[: len(own)], firsts, documents, coefficients, low, high)
                before += blocks

    return int(run.address)
