"""Compiles a function once, for loops that call it by its address. numba would compile it again inside each of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
from numba import types

_C_TYPES: dict[Any, Any] = {types.int64: ctypes.c_int64, types.float32: ctypes.c_float, types.void: None}


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """``signature``: of int64 and float32, such as ``types.void(types.int64)``. NaN and infinity stay what they are."""

    def compile_now(function: Callable[..., Any]) -> Any:
        code = numba.cfunc(signature, fastmath={"contract", "reassoc", "nsz"})(function)
        arguments = [_C_TYPES[kind] for kind in signature.args]
        pointer = ctypes.CFUNCTYPE(_C_TYPES[signature.return_type], *arguments)(code.address)
        _KEPT.append(code)
        return pointer

    return compile_now


_KEPT: list[Any] = []  # the code that pointers lead to
