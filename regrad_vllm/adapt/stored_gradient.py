"""A document's gradient as the compiled loops read it: not decoded, by its address."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

INT8, BF16, FLOAT32 = range(3)  # how its values lie in memory
Values = NDArray[Any] | torch.Tensor


class StoredGradient:
    """One document's δ where it lies: int8 codes with a float32 scale for each 64, bf16 halves, or float32."""

    __slots__ = ("_kept", "row")

    def __init__(self, kind: int, values: Values, scales: Values | None = None) -> None:
        self.row = (kind, _address(values), 0 if scales is None else _address(scales))
        self._kept = (values, scales)


def _address(values: Values) -> int:
    return int(values.data_ptr() if isinstance(values, torch.Tensor) else values.ctypes.data)
