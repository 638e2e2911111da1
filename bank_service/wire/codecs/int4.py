"""A codec that stores blocks of four-bit codes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs import nibbles
from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec, check_length
from bank_service.wire.codecs.blocks import BLOCK, from_blocks, num_blocks, to_blocks

INT4_BLOCK = BLOCK
MAX_INT4_SCALE = 2.0**124  # 7 times as much is still finite in float32


class Int4Codec:
    """Stores blocks of 64 values: one float32 scale, 64 codes in −7..7; value = scale · code. 0.5625 bytes a value.

    A block's scale is the smallest float32 s with 7·s ≥ max|value|. So no value is off by more than s/2, apart from
    the rounding of the product to float32. Payload: all scales, then all codes.
    """

    name = "int4"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 4 * num_blocks(spec.num_values) + nibbles.num_bytes(spec.num_values)

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        scales, codes = to_blocks(values, nibbles.MAX_CODE)
        payload = scales.tobytes() + nibbles.pack(codes).tobytes()
        self.check(memoryview(payload), spec)
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        scales, packed = _parts(payload, spec)
        # NaN must fail too, so this does not test "scale > limit".
        if not bool(((scales >= 0) & (scales <= MAX_INT4_SCALE)).all()):
            raise GradientFormatError("int4 scales must be in 0..2**124 (values below 1.5e38), got others")
        nibbles.check(packed, spec.num_values)

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        codes, scales = int4_codes(payload, spec)
        from_blocks(scales, codes, out)


def int4_codes(payload: memoryview, spec: GradientSpec) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """(codes, scales) of a checked payload: int8 (num_values,) and float32 (blocks,)."""
    scales, packed = _parts(payload, spec)
    return nibbles.unpack(packed, spec.num_values), scales


def _parts(payload: memoryview, spec: GradientSpec) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
    scales = np.frombuffer(payload, dtype="<f4", count=num_blocks(spec.num_values))
    return scales, np.frombuffer(payload, dtype=np.uint8, offset=4 * len(scales))
