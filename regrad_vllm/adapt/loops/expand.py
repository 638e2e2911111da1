"""Expands low-rank factors to values, a tile at a time. The bits are those of ``codecs.lowrank``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from bank_service.wire.codecs.lowrank import (
    CODE,
    COLUMNS,
    FIRST,
    LONG_IS_COLUMNS,
    LONG_LENGTH,
    RANK,
    SCALE,
    SHORT,
    SHORT_LENGTH,
    TABLE_FIELDS,
)
from bank_service.wire.codecs.lowrank_fit import LONG_BLOCK
from regrad_vllm.adapt.loops.memory import f32_array, i8_array, i64_array
from regrad_vllm.adapt.stored_gradient import SCALES, SHORTS, TABLE, VALUES


@numba.njit(nogil=True)
def _add_along(part: Any, short: Any, codes: Any, scales: Any, column: Any) -> None:
    """part += short · (scale · code), for the codes of a long vector from ``column`` on."""
    first, size = 0, len(part)
    while first < size:
        block = (column + first) // LONG_BLOCK
        last = min(size, (block + 1) * LONG_BLOCK - column)
        scale = scales[block]
        # The compiler sees that indices into a slice are in order, and makes vector instructions of the loops.
        piece, piece_codes = part[first:last], codes[column + first : column + last]
        for j in range(last - first):
            piece[j] += short * (np.float32(piece_codes[j]) * scale)
        first = last


@numba.njit(nogil=True)
def expand(delta: Any, gradient: Any, tensor: Any, start: Any) -> None:
    """Fills ``delta`` with the values of a gradient, from the flat vector's ``start`` on.

    The values are parts of a row, or whole rows, of one tensor of the layout. Its rows or its columns may be the long
    side.
    """
    entry = i64_array(gradient[TABLE], (tensor + 1) * TABLE_FIELDS)[tensor * TABLE_FIELDS :]
    length, rank, width, columns = entry[LONG_LENGTH], entry[RANK], entry[SHORT_LENGTH], entry[COLUMNS]
    blocks = (length + LONG_BLOCK - 1) // LONG_BLOCK
    codes = i8_array(gradient[VALUES], entry[CODE] + rank * length)[entry[CODE] :]
    scales = f32_array(gradient[SCALES], entry[SCALE] + rank * blocks)[entry[SCALE] :]
    shorts = f32_array(gradient[SHORTS], entry[SHORT] + rank * width)[entry[SHORT] :]
    row, column = (start - entry[FIRST]) // columns, (start - entry[FIRST]) % columns
    first = 0
    while first < len(delta):
        count = min(columns - column, len(delta) - first)
        part = delta[first : first + count]
        for j in range(count):
            part[j] = np.float32(0)
        for c in range(rank):
            own_codes, own_scales = codes[c * length : (c + 1) * length], scales[c * blocks : (c + 1) * blocks]
            if entry[LONG_IS_COLUMNS]:
                _add_along(part, shorts[c * width + row], own_codes, own_scales, column)
            else:
                long = np.float32(own_codes[row]) * own_scales[row // LONG_BLOCK]
                short = shorts[c * width + column : c * width + column + count]
                for j in range(count):
                    part[j] += short[j] * long
        first, row, column = first + count, row + 1, 0
