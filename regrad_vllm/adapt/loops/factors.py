"""Low-rank factors back to values, a tile at a time: what ``codecs.lowrank`` decodes, with its very bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from bank_service.wire.codecs.lowrank import (
    CODE,
    COLUMNS,
    FIRST,
    LONG_BLOCK,
    LONG_IS_COLUMNS,
    LONG_LENGTH,
    RANK,
    SCALE,
    SHORT,
    SHORT_LENGTH,
    TABLE_FIELDS,
)
from regrad_vllm.adapt.loops.memory import f32_array, i8_array, i64_array
from regrad_vllm.adapt.stored_gradient import SCALES, SHORTS, TABLE, VALUES


@numba.njit(nogil=True)
def expand(delta: Any, gradient: Any, tensor: Any, start: Any) -> None:
    """delta = the values of a gradient from the flat vector's ``start`` on, all of one tensor of the layout: a part of
    a row, or whole rows."""
    entry = i64_array(gradient[TABLE], (tensor + 1) * TABLE_FIELDS)[tensor * TABLE_FIELDS :]
    length, rank, width = entry[LONG_LENGTH], entry[RANK], entry[SHORT_LENGTH]
    blocks = (length + LONG_BLOCK - 1) // LONG_BLOCK
    codes = i8_array(gradient[VALUES], entry[CODE] + rank * length)[entry[CODE] :]
    scales = f32_array(gradient[SCALES], entry[SCALE] + rank * blocks)[entry[SCALE] :]
    shorts = f32_array(gradient[SHORTS], entry[SHORT] + rank * width)[entry[SHORT] :]
    row, column = (start - entry[FIRST]) // entry[COLUMNS], (start - entry[FIRST]) % entry[COLUMNS]
    if entry[LONG_IS_COLUMNS]:
        size = len(delta)
        for j in range(size):
            delta[j] = np.float32(0)
        for c in range(rank):
            short = shorts[c * width + row]
            first = 0
            while first < size:
                block = (column + first) // LONG_BLOCK
                last = min(size, (block + 1) * LONG_BLOCK - column)
                scale = scales[c * blocks + block]
                # Slices, so that indices are seen to be in order and the loops over them become vector instructions.
                part = delta[first:last]
                part_codes = codes[c * length + column + first : c * length + column + last]
                for j in range(last - first):
                    part[j] += short * (np.float32(part_codes[j]) * scale)
                first = last
        return
    for i in range(len(delta) // width):
        place = delta[i * width : (i + 1) * width]
        for j in range(width):
            place[j] = np.float32(0)
        for c in range(rank):
            long = np.float32(codes[c * length + row + i]) * scales[c * blocks + (row + i) // LONG_BLOCK]
            short_vector = shorts[c * width : (c + 1) * width]
            for j in range(width):
                place[j] += short_vector[j] * long
