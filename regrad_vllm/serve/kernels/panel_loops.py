"""Dense loops: products of a few rows with panels of 16 columns, and rows of x and y in their float types."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import types

from regrad_vllm.serve.kernels.compiled import compiled
from regrad_vllm.serve.kernels.raw_memory import FLOAT_TYPES
from regrad_vllm.serve.kernels.vector_code import TILE_ROWS, tile

_I64 = types.int64
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # the loops get an index into it


@cache
def product() -> Any:
    @compiled(types.void(*[_I64] * 10))
    def multiply(
        num_rows: Any, x: Any, x_stride: Any, w: Any, depth: Any, panels: Any, source: Any, out: Any, stride: Any,
        panel_stride: Any,
    ) -> None:  # fmt: skip
        """out = source + x W, in panels of 16 columns. Without a source (0) out = x W.

        x: (rows, depth). W: (panels, depth, 16). Row i of a panel is at i · stride, panel j at j · panel_stride, in
        ``source`` as in ``out``.
        """
        tiles = (num_rows + TILE_ROWS - 1) // TILE_ROWS
        for number in range(tiles):
            first = num_rows * number // tiles
            rows = num_rows * (number + 1) // tiles - first
            tile(
                rows, x + first * x_stride, x_stride, w, depth, panels, source + first * stride if source else 0,
                out + first * stride, stride, panel_stride,
            )  # fmt: skip

    return multiply


@cache
def widen() -> Any:
    loads, arrays = [FLOAT_TYPES[kind].load for kind in KINDS], [FLOAT_TYPES[kind].array for kind in KINDS]
    load_f32, load_bf16, load_f16 = loads
    f32, bf16, f16 = arrays

    @compiled(types.void(*[_I64] * 4))
    def to_floats(kind: Any, x: Any, size: Any, out: Any) -> None:
        """``size`` values of one of the ``KINDS`` → float32."""
        outs = f32(out, size)
        if kind == 0:
            own = f32(x, size)
            for j in range(size):
                outs[j] = load_f32(own[j])
        elif kind == 1:
            halves = bf16(x, size)
            for j in range(size):
                outs[j] = load_bf16(halves[j])
        else:
            halves = f16(x, size)
            for j in range(size):
                outs[j] = load_f16(halves[j])

    return to_floats


@cache
def add_rounded() -> Any:
    loads, stores = [FLOAT_TYPES[kind].load for kind in KINDS], [FLOAT_TYPES[kind].store for kind in KINDS]
    f32, bf16, f16 = (FLOAT_TYPES[kind].array for kind in KINDS)
    (_, load_bf16, load_f16), (_, store_bf16, store_f16) = loads, stores

    @compiled(types.void(*[_I64] * 4))
    def add(kind: Any, y: Any, size: Any, part: Any) -> None:
        """y += part, rounded once. y is of one of the ``KINDS``, part is float32."""
        parts = f32(part, size)
        if kind == 0:
            own = f32(y, size)
            for j in range(size):
                own[j] += parts[j]
        elif kind == 1:
            halves = bf16(y, size)
            for j in range(size):
                halves[j] = store_bf16(load_bf16(halves[j]) + parts[j])
        else:
            halves = f16(y, size)
            for j in range(size):
                halves[j] = store_f16(load_f16(halves[j]) + parts[j])

    return add
