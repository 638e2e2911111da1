"""Blocks of codes of four bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs import nibbles
from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec, check_length, slices

INT4_BLOCK = 64
MAX_INT4_SCALE = 2.0**124  # 7 times as much is still finite in float32


class Int4Codec:
    """Blocks of 64 values: one float32 scale, 64 codes in −7..7; value = scale · code. 0.5625 bytes a value.

    A block's scale is the smallest float32 s with 7·s ≥ max|value|: no value is off by more than s/2 (but for the
    product's own float32 rounding). Payload: all scales, then all codes.
    """

    name = "int4"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 4 * _num_blocks(spec) + nibbles.num_bytes(spec.num_values)

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        scales = np.empty(_num_blocks(spec), dtype="<f4")
        codes = np.empty(spec.num_values, dtype=np.int8)
        for part in slices(spec.num_values):
            exact = values[part].astype(np.float64)
            blocks = np.pad(exact, (0, -len(exact) % INT4_BLOCK)).reshape(-1, INT4_BLOCK)
            largest = np.abs(blocks).max(axis=1)
            scale = (largest / nibbles.MAX_CODE).astype(np.float32)
            # Rounding may have made the scale too small for its largest value; subnormal scales by far.
            short = scale.astype(np.float64) * nibbles.MAX_CODE < largest
            scale = np.where(short, np.nextafter(scale, np.float32(np.inf)), scale)
            scales[part.start // INT4_BLOCK : part.start // INT4_BLOCK + len(scale)] = scale
            blocks /= np.where(scale > 0, scale.astype(np.float64), 1.0)[:, np.newaxis]
            codes[part] = np.rint(blocks).reshape(-1)[: part.stop - part.start]
        payload = scales.tobytes() + nibbles.pack(codes).tobytes()
        self.check(memoryview(payload), spec)
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        scales, packed = _parts(payload, spec)
        # Not "scale > limit": NaN must fail too.
        if not bool(((scales >= 0) & (scales <= MAX_INT4_SCALE)).all()):
            raise GradientFormatError("int4 scales must be in 0..2**124 (values below 1.5e38), got others")
        nibbles.check(packed, spec.num_values)

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        codes, scales = int4_codes(payload, spec)
        whole = spec.num_values // INT4_BLOCK * INT4_BLOCK
        blocks = out[:whole].reshape(-1, INT4_BLOCK)
        np.multiply(codes[:whole].reshape(-1, INT4_BLOCK), scales[: len(blocks), np.newaxis], out=blocks)
        if whole < spec.num_values:
            np.multiply(codes[whole:], scales[-1], out=out[whole:])


def int4_codes(payload: memoryview, spec: GradientSpec) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """(codes, scales) of a checked payload, a byte a code: then it is composed from as int8 is."""
    scales, packed = _parts(payload, spec)
    return nibbles.unpack(packed, spec.num_values), scales


def _num_blocks(spec: GradientSpec) -> int:
    return -(-spec.num_values // INT4_BLOCK)


def _parts(payload: memoryview, spec: GradientSpec) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
    scales = np.frombuffer(payload, dtype="<f4", count=_num_blocks(spec))
    return scales, np.frombuffer(payload, dtype=np.uint8, offset=4 * len(scales))
