"""Codecs of older versions. Their records are only read, until `regrad recode` gives them factors.

- ``bf16``: the upper half of each float32.
- ``int8``, ``int4``: blocks of 64 values. The scales come first, float32, one for each block. Then come all codes; a
  value is scale · code. Codes of four bits stand two in a byte, the first in the lower half, each as code + 8.
- ``lowrank32``, ``lowrank64``, ``lowrank128``, ``lowrank256``: components, each a long vector times a short vector.

A payload of low rank is little-endian:
    version  u8, 255
    counts   u8, u8 for each tensor: its components of four and of two bits
    scales   bf16, one for each 128 values of a component's long vector
    shorts   bf16, the short vectors
    codes    of the long vectors, each component from a new byte
Codes of two bits are −3, −1, 1 and 3, stored as 0 to 3, four in a byte, the first in the lowest bits. The oldest
payloads have no version and no components of two bits. They begin with a count for each tensor. The longer side of a
tensor is the long one, and its columns if both are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import Decoder, FloatArray, GradientFormatError, GradientSpec, check_length
from bank_service.wire.codecs.bf16 import from_bf16

_BLOCK = 64
_LONG_BLOCK = 128
_VERSION = 255
_LIMIT = 2.0**58  # of scales and short values of low rank; then their sums are finite in float32


class _Bf16Codec:
    name = "bf16"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 2 * spec.num_values

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        if bool(((np.frombuffer(payload, "<u2") & 0x7F80) == 0x7F80).any()):
            raise GradientFormatError("values must be finite in bf16, got NaN or infinity")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        out[:] = from_bf16(np.frombuffer(payload, "<u2"))


class _BlockCodec:
    """``int8`` or ``int4``."""

    def __init__(self, bits: int) -> None:
        self.name = f"int{bits}"
        self._bits = bits
        self._max_scale = 2.0**121 if bits == 8 else 2.0**124  # the largest code times as much is finite in float32

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 4 * -(-spec.num_values // _BLOCK) + -(-spec.num_values * self._bits // 8)

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        check_length(self.name, payload, self.max_payload_bytes(spec))
        scales, codes = self._parts(payload, spec)
        # NaN must fail too, so this does not test "scale > limit".
        if not bool(((scales >= 0) & (scales <= self._max_scale)).all()):
            raise GradientFormatError(f"{self.name} scales must be in 0..{self._max_scale}, got others")
        if bool((codes == -(2 ** (self._bits - 1))).any()):
            raise GradientFormatError(f"{self.name} codes must be above {-(2 ** (self._bits - 1))}")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        scales, codes = self._parts(payload, spec)
        np.multiply(codes, np.repeat(scales, _BLOCK)[: len(codes)], out=out)

    def _parts(self, payload: memoryview, spec: GradientSpec) -> tuple[FloatArray, npt.NDArray[np.int8]]:
        scales = np.frombuffer(payload, "<f4", count=-(-spec.num_values // _BLOCK))
        stored = np.frombuffer(payload, np.uint8, offset=scales.nbytes)
        return scales, stored.view(np.int8) if self._bits == 8 else _nibbles(stored)[: spec.num_values]


@dataclass(frozen=True, slots=True)
class _Component:
    """A component of a payload: where its parts begin."""

    tensor: int
    bits: int
    scale: int  # its first one
    short: int  # its first value
    code: int  # its first byte


class _LowRankCodec:
    def __init__(self, share: int) -> None:
        self.name = f"lowrank{share}"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 1 + 2 * len(spec.shapes) + sum(min(shape) * _component_bytes(shape, 4) for shape in spec.shapes)

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        numbers, num_scales, stored, components = self._parts(payload, spec)
        # NaN must fail too, so this does not test "number > limit".
        if not bool((np.abs(numbers) <= _LIMIT).all()) or bool((numbers[:num_scales] < 0).any()):
            raise GradientFormatError(f"scales and short values of {self.name} must be finite and at most 2**58")
        for each in components:
            if bool((self._codes(stored, each, spec) == -8).any()):
                raise GradientFormatError(f"{self.name} codes must be in -7..7, got -8")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        numbers, num_scales, stored, components = self._parts(payload, spec)
        shorts = numbers[num_scales:]
        out[:] = 0
        starts = np.cumsum([0, *(rows * columns for rows, columns in spec.shapes)])
        for each in components:
            shape = spec.shapes[each.tensor]
            steps = numbers[each.scale : each.scale + -(-max(shape) // _LONG_BLOCK)]
            long = self._codes(stored, each, spec) * np.repeat(steps, _LONG_BLOCK)[: max(shape)]
            short = shorts[each.short : each.short + min(shape)]
            tensor = out[starts[each.tensor] : starts[each.tensor + 1]].reshape(shape)
            tensor += np.multiply.outer(short, long) if shape[1] >= shape[0] else np.multiply.outer(long, short)

    def _parts(
        self, payload: memoryview, spec: GradientSpec
    ) -> tuple[FloatArray, int, npt.NDArray[np.uint8], list[_Component]]:
        """(scales and short values, the number of scales, the bytes of codes, components). GradientFormatError."""
        shapes = spec.shapes
        is_new = payload[:1] == bytes([_VERSION])
        num_head = 1 + 2 * len(shapes) if is_new else len(shapes)
        if payload.nbytes < num_head:
            raise GradientFormatError(f"a {self.name} payload must begin with {num_head} bytes, got {payload.nbytes}")
        fours: Sequence[int] = payload[1:num_head:2] if is_new else payload[:num_head]
        twos: Sequence[int] = payload[2:num_head:2] if is_new else bytes(num_head)
        components: list[_Component] = []
        scale = short = code = 0
        for tensor, (four, two, shape) in enumerate(zip(fours, twos, shapes, strict=True)):
            if four + two > min(shape):
                raise GradientFormatError(
                    f"tensor {tensor} must have at most {min(shape)} components, got {four + two}"
                )
            for bits in (4,) * four + (2,) * two:
                components.append(_Component(tensor, bits, scale, short, code))
                scale += -(-max(shape) // _LONG_BLOCK)
                short += min(shape)
                code += _code_bytes(shape, bits)
        num_bytes = num_head + 2 * (scale + short) + code
        check_length(self.name, payload, num_bytes)
        numbers = from_bf16(np.frombuffer(payload, "<u2", count=scale + short, offset=num_head))
        return numbers, scale, np.frombuffer(payload, np.uint8, offset=num_bytes - code), components

    @staticmethod
    def _codes(stored: npt.NDArray[np.uint8], each: _Component, spec: GradientSpec) -> npt.NDArray[np.int8]:
        shape = spec.shapes[each.tensor]
        own = stored[each.code : each.code + _code_bytes(shape, each.bits)]
        if each.bits == 4:
            return _nibbles(own)[: max(shape)]
        quarters = (own[:, np.newaxis] >> np.array([0, 2, 4, 6], np.uint8)) & 3
        codes: npt.NDArray[np.int8] = quarters.reshape(-1)[: max(shape)].astype(np.int8) * 2 - 3
        return codes


def _code_bytes(shape: tuple[int, int], bits: int) -> int:
    return -(-max(shape) * bits // 8)


def _component_bytes(shape: tuple[int, int], bits: int) -> int:
    return 2 * -(-max(shape) // _LONG_BLOCK) + 2 * min(shape) + _code_bytes(shape, bits)


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    codes = np.empty(2 * len(packed), np.int8)
    codes[0::2] = (packed & 15).astype(np.int8) - 8
    codes[1::2] = (packed >> 4).astype(np.int8) - 8
    return codes


_ALL: tuple[Decoder, ...] = (
    _Bf16Codec(), _BlockCodec(8), _BlockCodec(4), *map(_LowRankCodec, (32, 64, 128, 256))
)  # fmt: skip
RETIRED_CODECS: Mapping[str, Decoder] = MappingProxyType({codec.name: codec for codec in _ALL})
