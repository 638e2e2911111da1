"""bfloat16, the upper half of float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import FloatArray


def to_bf16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    halves: npt.NDArray[np.uint16] = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(
        np.uint16
    )
    return halves


def from_bf16(halves: npt.NDArray[np.uint16]) -> FloatArray:
    values: FloatArray = (halves.astype(np.uint32) << 16).view(np.float32)
    return values
