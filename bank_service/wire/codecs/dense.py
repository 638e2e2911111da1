"""Codecs that store every value separately: float32, bfloat16, and blocks of int8 codes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec, check_length, slices
from bank_service.wire.codecs.blocks import BLOCK, from_blocks, num_blocks, to_bf16, to_blocks

INT8_BLOCK = BLOCK
_MAX_INT8_CODE = 127
MAX_INT8_SCALE = 2.0**121  # 127 times as much is still finite in float32


class Fp32Codec:
    """Stores the values unchanged, 4 bytes each. It is the reference for other codecs."""

    name = "fp32"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 4 * spec.num_values

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        return values.astype("<f4").tobytes()

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        values = np.frombuffer(payload, dtype="<f4")
        for part in slices(spec.num_values):
            if not bool(np.isfinite(values[part]).all()):
                raise GradientFormatError("values must be finite in fp32, got NaN or infinity")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        out[:] = np.frombuffer(payload, dtype="<f4")


class Bf16Codec:
    """Stores the upper half of each float32, rounded to nearest, ties to even. 2 bytes a value."""

    name = "bf16"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 2 * spec.num_values

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        halves = np.empty(spec.num_values, dtype="<u2")
        for part in slices(spec.num_values):
            halves[part] = to_bf16(values[part])
        payload = halves.tobytes()
        self.check(memoryview(payload), spec)  # the largest float32 values round to infinity
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        halves = np.frombuffer(payload, dtype="<u2")
        for part in slices(spec.num_values):
            if bool(((halves[part] & 0x7F80) == 0x7F80).any()):
                raise GradientFormatError("values must be finite in bf16, got NaN, infinity or more than 3.39e38")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        halves = np.frombuffer(payload, dtype="<u2")
        for part in slices(spec.num_values):
            np.left_shift(halves[part], 16, out=out[part].view(np.uint32), dtype=np.uint32)


class Int8Codec:
    """Stores blocks of 64 values: one float32 scale, 64 codes in -127..127; value = scale · code. 1.0625 bytes a value.

    A block's scale is the smallest float32 s with 127·s ≥ max|value|. Its codes are value / s rounded to nearest, ties
    to even. So no value is off by more than s/2 (but for the product's own float32 rounding).
    Payload: all scales, then all codes.
    """

    name = "int8"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 4 * num_blocks(spec.num_values) + spec.num_values

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        scales, codes = to_blocks(values, _MAX_INT8_CODE)
        payload = scales.tobytes() + codes.tobytes()
        self.check(memoryview(payload), spec)
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        scales, codes = self._parts(payload, spec)
        for part in slices(len(scales)):
            # NaN must fail too, so this does not test "scale > limit".
            if not bool(((scales[part] >= 0) & (scales[part] <= MAX_INT8_SCALE)).all()):
                raise GradientFormatError("int8 scales must be in 0..2**121 (values below 3.37e38), got others")
        for part in slices(spec.num_values):
            if bool((codes[part] == -128).any()):
                raise GradientFormatError("int8 codes must be in -127..127, got -128")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        from_blocks(*self._parts(payload, spec), out)

    def _parts(self, payload: memoryview, spec: GradientSpec) -> tuple[FloatArray, npt.NDArray[np.int8]]:
        scales = np.frombuffer(payload, dtype="<f4", count=num_blocks(spec.num_values))
        return scales, np.frombuffer(payload, dtype=np.int8, offset=scales.nbytes)
