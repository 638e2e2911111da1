"""Loops over one document's factors of one tensor, read where they lie.

``form`` is the address of the tensor's row in ``FactorForm.table``, which tells where its parts are. ``x`` and ``part``
begin at a whole block of the long side, number ``block``. All addresses are int64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from bank_service.wire.codecs.factors import BLOCK, CODES, COUNT, LONG, SCALES, SHORT, SHORTS, STRIDE
from regrad_vllm.serve.kernels.compiled import compiled
from regrad_vllm.serve.kernels.raw_memory import FLOAT_TYPES, f32_array, i8_array, i64_array, u16_array
from regrad_vllm.serve.kernels.vector_code import (
    LANES,
    add_bf16,
    dot_bf16,
    gather8,
    gather_blocks,
    prefetch,
    scaled_coefficients,
    spread4,
    spread8,
)

_LINE = 64  # bytes of a line of the CPU's cache
_WIDE = 64  # codes taken at a time, where there are so many
_I64, _F32 = types.int64, types.float32
load_bf16 = FLOAT_TYPES[torch.bfloat16].load


@numba.njit(inline="always")
def form_address(tables: Any, num_tensors: Any, form: Any, tensor: Any) -> Any:
    """The address of a tensor's row in a form's table, which has seven int64. ``tables``: of ``Forms.tables``."""
    return tables + 7 * 8 * (form * num_tensors + tensor)


@cache
def fetch() -> Any:
    @compiled(types.void(*[_I64] * 5))
    def fetch_blocks(payload: Any, bits: Any, form: Any, block: Any, num_blocks: Any) -> None:
        """Prefetches scales, shorts, and the codes of some blocks of a document."""
        form = i64_array(form, 7)
        for place in range(form[SCALES], form[SHORTS] + 2 * form[COUNT] * form[SHORT], _LINE):
            prefetch(payload + place)
        for c in range(form[COUNT]):
            first = payload + form[CODES] + c * form[STRIDE] + block * (16 * bits)
            for place in range(first, first + num_blocks * (16 * bits), _LINE):
                prefetch(place)

    return fetch_blocks


@cache
def add_inputs() -> Any:
    gather_blocks8, gather_blocks4 = gather_blocks(8), gather_blocks(4)

    @compiled(types.void(_I64, _I64, _I64, _F32, _I64, _I64, _I64, _I64))
    def add(payload: Any, bits: Any, form: Any, coefficient: Any, x: Any, h: Any, block: Any, num_blocks: Any) -> None:
        """h += coefficient · P (Q x) of a document. x is zero where this worker has no input."""
        form = i64_array(form, 7)
        length, size = form[LONG], form[SHORT]
        all_blocks, vectors = (length + BLOCK - 1) // BLOCK, size // LANES
        whole = num_blocks if bits == 4 else min(num_blocks, length // BLOCK - block)
        own_h = f32_array(h, size)
        for c in range(form[COUNT]):
            codes = payload + form[CODES] + c * form[STRIDE] + block * (16 * bits)
            scales = payload + form[SCALES] + 2 * (c * all_blocks + block)
            total = gather_blocks4(x, codes, scales, whole) if bits == 4 else gather_blocks8(x, codes, scales, whole)
            if whole < num_blocks:  # the tensor's last block, cut short
                last_x, last_codes, last_size = x + 4 * BLOCK * whole, codes + BLOCK * whole, length % BLOCK
                rest = gather8(last_x, last_codes, last_size // LANES)
                some_x, some_codes = f32_array(last_x, last_size), i8_array(last_codes, last_size)
                for j in range(last_size // LANES * LANES, last_size):
                    rest += np.float32(some_codes[j]) * some_x[j]
                total += load_bf16(u16_array(scales, whole + 1)[whole]) * rest
            shorts = payload + form[SHORTS] + 2 * c * size
            add_bf16(h, shorts, vectors, coefficient * total)
            own = u16_array(shorts, size)
            for j in range(vectors * LANES, size):
                own_h[j] += coefficient * total * load_bf16(own[j])

    return add


@cache
def weights() -> Any:
    @compiled(types.void(_I64, _I64, _F32, _I64, _I64))
    def weigh(payload: Any, form: Any, coefficient: Any, h: Any, out: Any) -> None:
        """out[c] = coefficient · V h of each component of a document."""
        form = i64_array(form, 7)
        size, vectors = form[SHORT], form[SHORT] // LANES
        own_h, outs = f32_array(h, size), f32_array(out, form[COUNT])
        for c in range(form[COUNT]):
            shorts = payload + form[SHORTS] + 2 * c * size
            total = dot_bf16(h, shorts, vectors)
            own = u16_array(shorts, size)
            for j in range(vectors * LANES, size):
                total += load_bf16(own[j]) * own_h[j]
            outs[c] = coefficient * total

    return weigh


@cache
def add_outputs() -> Any:
    spread_wide, spread = spread8(_WIDE), spread8(LANES)

    @compiled(types.void(*[_I64] * 8))
    def add(
        payload: Any, bits: Any, form: Any, coefficients: Any, work: Any, part: Any, block: Any, num_blocks: Any
    ) -> None:
        """part += Σ_c coefficients[c] · scale · code of a document, over ``num_blocks`` blocks.

        work: as many floats as ``coefficients``. ``part`` has whole blocks, though the tensor may end before.
        """
        form = i64_array(form, 7)
        count, length, stride = form[COUNT], form[LONG], form[STRIDE]
        all_blocks = (length + BLOCK - 1) // BLOCK
        for number in range(block, block + num_blocks):
            own = part + 4 * BLOCK * (number - block)
            codes, scales = payload + form[CODES] + number * (16 * bits), payload + form[SCALES] + 2 * number
            scaled_coefficients(work, coefficients, scales, 2 * all_blocks, count)
            if bits == 4:
                spread4(own, codes, stride, work, count)
                continue
            size = min(BLOCK, length - number * BLOCK)
            done = 0
            while size - done >= _WIDE:
                spread_wide(own + 4 * done, codes + done, stride, work, count)
                done += _WIDE
            while size - done >= LANES:
                spread(own + 4 * done, codes + done, stride, work, count)
                done += LANES
            if done < size:
                last, factors = f32_array(own, size), f32_array(work, count)
                for c in range(count):
                    last_codes = i8_array(codes + c * stride, size)
                    for j in range(done, size):
                        last[j] += factors[c] * np.float32(last_codes[j])

    return add
