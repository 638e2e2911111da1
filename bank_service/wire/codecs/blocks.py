"""Functions that codecs share: blocks of codes with one scale per block, and bfloat16, the upper half of float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import FloatArray, slices

BLOCK = 64  # values with one scale


def num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK)


def to_blocks(values: FloatArray, max_code: int) -> tuple[FloatArray, npt.NDArray[np.int8]]:
    """(scales, codes in −max_code..max_code) of finite ``values``.

    A block's scale is the smallest float32 s with max_code · s ≥ max|value|. Its codes are value / s rounded to
    nearest, ties to even. So no value is off by more than s/2.
    """
    scales = np.empty(num_blocks(len(values)), dtype="<f4")
    codes = np.empty(len(values), dtype=np.int8)
    for part in slices(len(values)):
        exact = values[part].astype(np.float64)
        blocks = np.pad(exact, (0, -len(exact) % BLOCK)).reshape(-1, BLOCK)
        largest = np.abs(blocks).max(axis=1)
        scale = (largest / max_code).astype(np.float32)
        # Rounding may have made the scale too small for its largest value. A subnormal scale may be far too small.
        short = scale.astype(np.float64) * max_code < largest
        scale = np.where(short, np.nextafter(scale, np.float32(np.inf)), scale)
        scales[part.start // BLOCK : part.start // BLOCK + len(scale)] = scale
        blocks /= np.where(scale > 0, scale.astype(np.float64), 1.0)[:, np.newaxis]
        codes[part] = np.rint(blocks).reshape(-1)[: part.stop - part.start]
    return scales, codes


def from_blocks(scales: FloatArray, codes: npt.NDArray[np.int8], out: FloatArray) -> None:
    """value = scale · code, in float32."""
    whole = len(codes) // BLOCK * BLOCK
    blocks = out[:whole].reshape(-1, BLOCK)
    np.multiply(codes[:whole].reshape(-1, BLOCK), scales[: len(blocks), np.newaxis], out=blocks)
    if whole < len(codes):
        np.multiply(codes[whole:], scales[-1], out=out[whole:])


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
