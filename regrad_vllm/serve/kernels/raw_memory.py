"""Helpers of all loops: float types that numba doesn't support, and arrays at raw addresses.

A tensor is passed as its address, because numba has no bfloat16 and float16 on CPUs. Their bits are read and written as
uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_U16, _U32 = ir.IntType(16), ir.IntType(32)


def _array_maker(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(element)))

        return types.CPointer(element)(types.int64), generate

    @numba.njit(inline="always")
    def array(address: Any, size: Any) -> Any:
        return numba.carray(pointer(address), (size,))

    return array


f32_array = _array_maker(types.float32)
i8_array = _array_maker(types.int8)
i32_array = _array_maker(types.int32)
i64_array = _array_maker(types.int64)
u16_array = _array_maker(types.uint16)


@intrinsic
def _bits(typingctx: Any, value: Any) -> Any:
    """float32 → its bits, uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _U32)

    return types.uint32(types.float32), generate


@intrinsic
def _from_bf16(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], _U32), ir.Constant(_U32, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _from_f16(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_f16(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _U16)

    return types.uint16(types.float32), generate


@numba.njit(inline="always")
def _same(value: Any) -> Any:
    return value


@numba.njit(inline="always")
def _to_bf16(value: Any) -> Any:
    """Rounds to nearest, ties to even. NaN stays NaN or becomes infinity."""
    bits = _bits(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@dataclass(frozen=True, slots=True)
class FloatType:
    """The compiled functions for one float type in memory."""

    array: Callable[..., Any]  # (address, size) → its stored elements
    load: Callable[..., Any]  # stored → float32
    store: Callable[..., Any]  # float32 → stored, rounded to nearest, ties to even


FLOAT_TYPES = {
    torch.float32: FloatType(f32_array, _same, _same),
    torch.bfloat16: FloatType(u16_array, _from_bf16, _to_bf16),
    torch.float16: FloatType(u16_array, _from_f16, _to_f16),
}
