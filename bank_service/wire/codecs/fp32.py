"""The codec that stores float32 values as they are."""

from __future__ import annotations

import numpy as np

from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec, check_length, slices


class Fp32Codec:
    """4 bytes a value. Other encoders upload their gradients in it. It is the reference for the codec of factors."""

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
