"""Packs codes of four bits, two in a byte, the first in the lower half. The codes −7..7 are stored as 1..15."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import GradientFormatError

MAX_CODE = 7
_ZERO = 8  # stands for the code 0; 0 itself stands for no code


def num_bytes(num_codes: int) -> int:
    return -(-num_codes // 2)


def pack(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Packs codes in −7..7. If their number is odd, the last byte's upper half has the code 0."""
    halves = np.full(2 * num_bytes(len(codes)), _ZERO, np.uint8)
    halves[: len(codes)] = codes + _ZERO
    packed: npt.NDArray[np.uint8] = (halves[0::2] | (halves[1::2] << 4)).astype(np.uint8)
    return packed


def check(packed: npt.NDArray[np.uint8], num_codes: int) -> None:
    """GradientFormatError unless ``unpack`` gives codes in −7..7, and equal codes have equal bytes."""
    if bool(((packed & 15) == 0).any() | ((packed >> 4) == 0).any()):
        raise GradientFormatError("int4 codes must be in -7..7, got -8")
    if num_codes % 2 and packed[-1] >> 4 != _ZERO:
        raise GradientFormatError("the last byte's upper half must be empty for an odd number of int4 codes")


def unpack(packed: npt.NDArray[np.uint8], num_codes: int) -> npt.NDArray[np.int8]:
    codes = np.empty(2 * len(packed), np.int8)
    codes[0::2] = (packed & 15).astype(np.int8) - _ZERO
    codes[1::2] = (packed >> 4).astype(np.int8) - _ZERO
    return codes[:num_codes]
