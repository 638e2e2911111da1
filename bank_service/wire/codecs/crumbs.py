"""Packs codes of two bits, four in a byte, the first in the lowest bits. The codes −3, −1, 1, 3 are stored as 0..3."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import GradientFormatError

MAX_CODE = 3
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def num_bytes(num_codes: int) -> int:
    return -(-num_codes // 4)


def pack(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Packs odd codes in −3..3. Unused bits of the last byte are 0."""
    quarters = np.zeros(4 * num_bytes(len(codes)), np.uint8)
    quarters[: len(codes)] = (codes + MAX_CODE) // 2
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(quarters.reshape(-1, 4) << _SHIFTS, axis=1)
    return packed


def check(packed: npt.NDArray[np.uint8], num_codes: int) -> None:
    """GradientFormatError unless the unused bits of the last byte are 0. So equal codes have equal bytes."""
    if num_codes % 4 and packed[-1] >> (2 * (num_codes % 4)):
        raise GradientFormatError("what is left of the last byte of two-bit codes must be empty")


def unpack(packed: npt.NDArray[np.uint8], num_codes: int) -> npt.NDArray[np.int8]:
    quarters = (packed[:, np.newaxis] >> _SHIFTS) & 3
    codes: npt.NDArray[np.int8] = (quarters.reshape(-1)[:num_codes].astype(np.int8) * 2) - MAX_CODE
    return codes
