"""Low-rank factors of two and four bits. Of every tensor, the codec keeps the directions that matter most.

A document's gradient is nearly of rank one in each tensor. A tensor (rows, columns) of a LoRA pair has one short side,
the rank. A **component** of it is a vector along the long side times one along the short side. ``lowrank_fit`` chooses
the components of all tensors and their numbers of bits. It takes the component that saves the most cost per byte first,
until a budget is spent. The budget is the same for every document. The cost of an error comes from the learner's Fisher
information (``sensitivity``), similar to FWSVD (Hsu et al., 2022), but for both sides of a tensor. Without it, the cost
is the square of the error.

Payload, little-endian:
    version  u8, 255
    counts   u8, u8 for each tensor: its components of four and of two bits
    scales   bf16, one for each 128 values of a component's long vector
    shorts   bf16, the short vectors
    codes    four or two bits a value of the long vectors, each component from a new byte
Value (i, j) of a tensor is Σ short[c, i] · (scale · code)[c, j] over its components in order, in float32, i along the
short side. The oldest payloads have no version and no components of two bits. They begin with a byte for each tensor,
its number of components of four bits. They can still be read.

Two errors add up: the components left out, and rounding. Long vectors are rounded to multiples of a step per block. Of
several steps, the one with the least cost is chosen. Then the short vectors are fitted by least squares to the rounded
long vectors. Last, they are rounded to 8 bits of mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs import crumbs, nibbles
from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec
from bank_service.wire.codecs.blocks import from_bf16
from bank_service.wire.codecs.lowrank_fit import LONG_BLOCK, chosen, component_bytes, directions_of, long_is_columns

FIRST, COLUMNS, RANK, LONG_IS_COLUMNS, CODE, SCALE, SHORT, LONG_LENGTH, SHORT_LENGTH = range(9)
TABLE_FIELDS = 9
_VERSION = 255
_LIMIT = 2.0**58  # of scales and short values; then a sum of 510 products short · scale · 7 is finite in float32
_LARGEST_VALUE = 2.0**50  # of a gradient; then its short values stay below the limit
_FP32_BYTES = 4
_RECORD_HEADER_BYTES = 128  # the size limit holds for the whole record, with its header

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Factors:
    """An unpacked payload: one byte for each code, scales and short values in float32.

    ``table``, int64 (tensors, TABLE_FIELDS), has a row for each tensor. Its columns, in this order, are:

    - FIRST: the tensor's first value in the flat vector
    - COLUMNS: the number of columns
    - RANK: the number of components
    - LONG_IS_COLUMNS: 1 if the columns are the long side
    - CODE, SCALE, SHORT: its first code, first scale and first short value
    - LONG_LENGTH, SHORT_LENGTH: the lengths of its sides

    A tensor's components follow one another. Each has codes for the long side, scales for its blocks, and short values.
    """

    codes: npt.NDArray[np.int8]
    scales: FloatArray
    shorts: FloatArray
    table: Int64Array


class LowRankCodec:
    """A record has at most 1/``share`` of the bytes of float32, its header included."""

    def __init__(self, share: int) -> None:
        self.name = f"lowrank{share}"
        self._share = share

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        fixed = _fixed_bytes(spec.shapes)
        budget = _FP32_BYTES * spec.num_values // self._share - _RECORD_HEADER_BYTES - fixed
        everything = sum(min(shape) * component_bytes(shape, 4) for shape in spec.shapes)
        # The smallest learner gets one component, even if the budget is smaller.
        return fixed + min(max(budget, min(component_bytes(shape, 2) for shape in spec.shapes)), everything)

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        if float(np.abs(values).max()) > _LARGEST_VALUE:
            raise GradientFormatError(f"values must be at most 2**50 in {self.name}; the gradient diverged")
        directions = directions_of(values, spec)
        counts = chosen(directions, spec.shapes, self.max_payload_bytes(spec) - _fixed_bytes(spec.shapes))
        scales, shorts, codes = [], [], []
        for own, count in zip(directions, counts, strict=True):
            for place, component in enumerate(own.components(count)):
                scales.append(component.scales)
                shorts.append(component.short)
                codes.append((nibbles if place < count.four else crumbs).pack(component.codes))
        halves: npt.NDArray[np.uint16] = np.concatenate([*scales, *shorts]) if scales else np.empty(0, np.uint16)
        packed = np.concatenate(codes) if codes else np.empty(0, np.uint8)
        head = bytes([_VERSION, *(number for count in counts for number in (count.four, count.two))])
        payload = head + halves.astype("<u2").tobytes() + packed.tobytes()
        self.check(memoryview(payload), spec)
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        least, largest = len(spec.shapes), self.max_payload_bytes(spec)
        if not least <= payload.nbytes <= largest:
            raise GradientFormatError(
                f"a {self.name} payload must be {least}..{largest} bytes for this layout, got {payload.nbytes}"
            )
        counts = _counts(payload, spec.shapes)
        num_bytes = counts.num_head
        for index, (four, two, shape) in enumerate(zip(counts.four, counts.two, spec.shapes, strict=True)):
            if four + two > min(shape):
                raise GradientFormatError(f"tensor {index} must have at most {min(shape)} components, got {four + two}")
            num_bytes += four * component_bytes(shape, 4) + two * component_bytes(shape, 2)
        if payload.nbytes != num_bytes:  # checked before a plan is made, because plans stay in memory
            raise GradientFormatError(
                f"a {self.name} payload of these counts must be {num_bytes} bytes, got {payload.nbytes}"
            )
        plan = _plan(counts, spec.shapes)
        halves, packed = _parts(payload, plan)
        numbers = from_bf16(halves)
        # NaN must fail too, so this does not test "number > limit".
        if not bool((np.abs(numbers) <= _LIMIT).all()) or bool((numbers[: plan.num_scales] < 0).any()):
            raise GradientFormatError(f"scales and short values of {self.name} must be finite and at most 2**58")
        for row in plan.rows:
            row.kind.check(packed[row.start : row.end], row.num_codes)

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        factors = unpacked(payload, spec)
        for row, shape in zip(factors.table, spec.shapes, strict=True):
            first, _, rank, is_wide, code, scale, short, length, width = (int(value) for value in row)
            blocks = -(-length // LONG_BLOCK)
            total = np.zeros((width, length), np.float32)
            for c in range(rank):
                codes = factors.codes[code + c * length : code + (c + 1) * length]
                steps = factors.scales[scale + c * blocks : scale + (c + 1) * blocks]
                long = codes.astype(np.float32) * np.repeat(steps, LONG_BLOCK)[:length]
                total += factors.shorts[short + c * width : short + (c + 1) * width, np.newaxis] * long
            place = out[first : first + width * length].reshape(shape)
            place[:] = total if is_wide else total.T


def unpacked(payload: memoryview, spec: GradientSpec) -> Factors:
    """Unpacks a checked payload. The server composes adapters from its factors."""
    plan = _plan(_counts(payload, spec.shapes), spec.shapes)
    halves, packed = _parts(payload, plan)
    numbers = from_bf16(halves)
    codes = [row.kind.unpack(packed[row.start : row.end], row.num_codes) for row in plan.rows]
    return Factors(
        codes=np.concatenate(codes) if codes else np.empty(0, np.int8),
        scales=numbers[: plan.num_scales],
        shorts=numbers[plan.num_scales :],
        table=plan.table,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """The place of a component's codes among the payload's bytes of codes."""

    kind: ModuleType  # ``nibbles`` or ``crumbs``
    start: int  # the first byte
    num_codes: int

    @property
    def end(self) -> int:
        return self.start + int(self.kind.num_bytes(self.num_codes))


@dataclass(frozen=True, slots=True)
class _Plan:
    """The places of all parts of a payload. They depend only on its counts."""

    table: Int64Array
    rows: tuple[_Row, ...]
    num_head: int
    num_scales: int
    num_shorts: int


@dataclass(frozen=True, slots=True)
class _Counts:
    """The numbers of each tensor's components, and the length of the payload's head with these numbers."""

    four: bytes
    two: bytes
    num_head: int


def _counts(payload: memoryview, shapes: Sequence[tuple[int, int]]) -> _Counts:
    """Reads the counts of a payload. GradientFormatError if the payload is too short for them."""
    if payload[0] != _VERSION:
        return _Counts(bytes(payload[: len(shapes)]), bytes(len(shapes)), len(shapes))
    num_head = _fixed_bytes(shapes)
    if payload.nbytes < num_head:
        raise GradientFormatError(f"a low-rank payload must begin with {num_head} bytes, got {payload.nbytes}")
    return _Counts(bytes(payload[1:num_head:2]), bytes(payload[2:num_head:2]), num_head)


@lru_cache(maxsize=256)
def _plan(counts: _Counts, shapes: tuple[tuple[int, int], ...]) -> _Plan:
    table = np.zeros((len(shapes), TABLE_FIELDS), np.int64)
    rows: list[_Row] = []
    value = code = scale = short = code_bytes = 0
    for index, (four, two, shape) in enumerate(zip(counts.four, counts.two, shapes, strict=True)):
        length, rank = max(shape), four + two
        table[index] = value, shape[1], rank, long_is_columns(shape), code, scale, short, length, min(shape)
        for place in range(rank):
            rows.append(_Row(nibbles if place < four else crumbs, code_bytes, length))
            code_bytes = rows[-1].end
        value += shape[0] * shape[1]
        code += rank * length
        scale += rank * -(-length // LONG_BLOCK)
        short += rank * min(shape)
    table.setflags(write=False)  # all payloads with the same counts share it
    return _Plan(table, tuple(rows), counts.num_head, scale, short)


def _parts(payload: memoryview, plan: _Plan) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    numbers = plan.num_scales + plan.num_shorts
    halves = np.frombuffer(payload, dtype="<u2", count=numbers, offset=plan.num_head)
    return halves, np.frombuffer(payload, dtype=np.uint8, offset=plan.num_head + 2 * numbers)


def _fixed_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """The bytes of version and counts."""
    return 1 + 2 * len(shapes)
