"""Low-rank factors in four bits: of every tensor the singular directions that carry most of the gradient.

A document's gradient is nearly of rank one in each tensor. A tensor (rows, columns) of a LoRA pair has one short side,
the rank; a **component** of it is a vector along the long side times one along the short side. Which components of
which tensors are kept is chosen by energy (σ²) for each byte, until a budget is spent that is the same for every
document: the largest first, wherever they lie.

Payload, little-endian:
    ranks    u8 for each tensor: its components, in order of energy
    scales   bf16, one for each 128 values of a component's long vector
    shorts   bf16, the short vectors
    codes    four bits a value of the long vectors, each component from a new byte
Value (i, j) of a tensor is Σ short[c, i] · (scale · code)[c, j] over its components in order, in float32, i along the
short side.

Error, beside the components left out (their energy is known: 1 − kept / all): long vectors are rounded to a step of
their block, chosen for the least squared error, and the short vectors are then fitted anew to the rounded ones by least
squares, so that no other short vectors would have come closer, before they are rounded to 8 bits of mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs import nibbles
from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec
from bank_service.wire.codecs.blocks import from_bf16, to_bf16

LONG_BLOCK = 128
FIRST, COLUMNS, RANK, LONG_IS_COLUMNS, CODE, SCALE, SHORT, LONG_LENGTH, SHORT_LENGTH = range(9)
TABLE_FIELDS = 9
_LIMIT = 2.0**58  # of scales and short values: the sum of 255 products with 7 times one is finite in float32
_FP32_BYTES = 4
_RECORD_HEADER_BYTES = 128  # counted in: the promise is about the record
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the largest value in a block, tried for its step

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Factors:
    """A payload unpacked: codes a byte each, scales and short values in float32.

    ``table``, int64 (tensors, TABLE_FIELDS), says where each tensor's lie: its first value in the flat vector, columns,
    components, whether the long side is the columns, first code, first scale, first short value, length of the long
    and of the short side. Components follow one another, in steps of the long side, its blocks and the short side.
    """

    codes: npt.NDArray[np.int8]
    scales: FloatArray
    shorts: FloatArray
    table: Int64Array


class LowRankCodec:
    """At most 1/``share`` of the bytes of float32, the record's header included."""

    def __init__(self, share: int) -> None:
        self.name = f"lowrank{share}"
        self._share = share

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        costs = [_component_bytes(shape) for shape in spec.shapes]
        budget = _FP32_BYTES * spec.num_values // self._share - _RECORD_HEADER_BYTES - len(costs)
        everything = sum(min(shape) * cost for shape, cost in zip(spec.shapes, costs, strict=True))
        # A learner so small that no component fits still gets the smallest.
        return len(costs) + min(max(budget, min(costs)), everything)

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        if float(np.abs(values).max()) > _LIMIT:
            raise GradientFormatError(f"values must be at most 2**58 in {self.name}; the gradient diverged")
        sides = [_short_first(values, start, shape) for start, shape in zip(_starts(spec), spec.shapes, strict=True)]
        directions = [_directions(side) for side in sides]
        ranks = self._ranks([energy for energy, _ in directions], spec)
        scales, shorts, codes = [], [], []
        for side, (_, vectors), rank in zip(sides, directions, ranks, strict=True):
            if rank:
                long = vectors[:rank] @ side
                own_scales, own_codes = _quantised(long)
                shorts.append(_bf16(_fitted(side, _long_values(own_codes, own_scales))).reshape(-1))
                scales.append(_bf16(own_scales).reshape(-1))
                codes += [nibbles.pack(row) for row in own_codes]
        halves: npt.NDArray[np.uint16] = np.concatenate([*scales, *shorts]) if scales else np.empty(0, np.uint16)
        packed = np.concatenate(codes) if codes else np.empty(0, np.uint8)
        payload = bytes(ranks) + halves.astype("<u2").tobytes() + packed.tobytes()
        self.check(memoryview(payload), spec)
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        largest = self.max_payload_bytes(spec)
        if not len(spec.shapes) <= payload.nbytes <= largest:
            raise GradientFormatError(
                f"a {self.name} payload must be {len(spec.shapes)}..{largest} bytes for this layout, got "
                f"{payload.nbytes}"
            )
        ranks = bytes(payload[: len(spec.shapes)])
        for index, (rank, shape) in enumerate(zip(ranks, spec.shapes, strict=True)):
            if rank > min(shape):
                raise GradientFormatError(f"tensor {index} must have at most {min(shape)} components, got {rank}")
        plan = _plan(ranks, spec.shapes)
        if payload.nbytes != plan.num_bytes:
            raise GradientFormatError(
                f"a {self.name} payload of these ranks must be {plan.num_bytes} bytes, got {payload.nbytes}"
            )
        halves, packed = _parts(payload, plan)
        numbers = from_bf16(halves)
        # Not "number > limit": NaN must fail too.
        if not bool((np.abs(numbers) <= _LIMIT).all()) or bool((numbers[: plan.num_scales] < 0).any()):
            raise GradientFormatError(f"scales and short values of {self.name} must be finite and at most 2**58")
        for start, length in plan.rows:
            nibbles.check(packed[start : start + nibbles.num_bytes(length)], length)

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        factors = unpacked(payload, spec)
        for row, shape in zip(factors.table, spec.shapes, strict=True):
            first, _, rank, long_is_columns, code, scale, short, length, width = (int(value) for value in row)
            blocks = -(-length // LONG_BLOCK)
            total = np.zeros((width, length), np.float32)
            for c in range(rank):
                codes = factors.codes[code + c * length : code + (c + 1) * length]
                steps = factors.scales[scale + c * blocks : scale + (c + 1) * blocks]
                long = codes.astype(np.float32) * np.repeat(steps, LONG_BLOCK)[:length]
                total += factors.shorts[short + c * width : short + (c + 1) * width, np.newaxis] * long
            place = out[first : first + width * length].reshape(shape)
            place[:] = total if long_is_columns else total.T

    def _ranks(self, energies: list[Float64Array], spec: GradientSpec) -> list[int]:
        """Components of each tensor: the most energy for a byte first, while they fit."""
        costs = [_component_bytes(shape) for shape in spec.shapes]
        left = self.max_payload_bytes(spec) - len(costs)
        order = sorted(
            ((-float(value) / costs[index], index) for index, own in enumerate(energies) for value in own if value > 0)
        )
        ranks = [0] * len(costs)
        for _, index in order:  # of one tensor, which all cost the same, the greatest energies come first
            if costs[index] <= left:
                ranks[index] += 1
                left -= costs[index]
        return ranks


def unpacked(payload: memoryview, spec: GradientSpec) -> Factors:
    """A checked payload as it is composed from."""
    plan = _plan(bytes(payload[: len(spec.shapes)]), spec.shapes)
    halves, packed = _parts(payload, plan)
    numbers = from_bf16(halves)
    codes = [nibbles.unpack(packed[start : start + nibbles.num_bytes(length)], length) for start, length in plan.rows]
    return Factors(
        codes=np.concatenate(codes) if codes else np.empty(0, np.int8),
        scales=numbers[: plan.num_scales],
        shorts=numbers[plan.num_scales :],
        table=plan.table,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where everything of a payload lies, which its ranks alone decide."""

    table: Int64Array
    rows: tuple[tuple[int, int], ...]  # of each component: its first byte among the codes, its number of codes
    num_ranks: int
    num_scales: int
    num_shorts: int
    num_bytes: int


@lru_cache(maxsize=256)
def _plan(ranks: bytes, shapes: tuple[tuple[int, int], ...]) -> _Plan:
    table = np.zeros((len(shapes), TABLE_FIELDS), np.int64)
    rows: list[tuple[int, int]] = []
    value = code = scale = short = code_bytes = 0
    for index, (rank, shape) in enumerate(zip(ranks, shapes, strict=True)):
        length = max(shape)
        table[index] = value, shape[1], rank, _long_is_columns(shape), code, scale, short, length, min(shape)
        for _ in range(rank):
            rows.append((code_bytes, length))
            code_bytes += nibbles.num_bytes(length)
        value += shape[0] * shape[1]
        code += rank * length
        scale += rank * -(-length // LONG_BLOCK)
        short += rank * min(shape)
    table.setflags(write=False)  # it is shared
    return _Plan(table, tuple(rows), len(shapes), scale, short, len(shapes) + 2 * (scale + short) + code_bytes)


def _parts(payload: memoryview, plan: _Plan) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    numbers = plan.num_scales + plan.num_shorts
    halves = np.frombuffer(payload, dtype="<u2", count=numbers, offset=plan.num_ranks)
    return halves, np.frombuffer(payload, dtype=np.uint8, offset=plan.num_ranks + 2 * numbers)


def _long_is_columns(shape: tuple[int, int]) -> bool:
    return shape[1] >= shape[0]


def _component_bytes(shape: tuple[int, int]) -> int:
    return 2 * -(-max(shape) // LONG_BLOCK) + 2 * min(shape) + nibbles.num_bytes(max(shape))


def _starts(spec: GradientSpec) -> list[int]:
    starts = [0]
    for rows, columns in spec.shapes:
        starts.append(starts[-1] + rows * columns)
    return starts[:-1]


def _short_first(values: FloatArray, start: int, shape: tuple[int, int]) -> Float64Array:
    tensor = values[start : start + shape[0] * shape[1]].reshape(shape).astype(np.float64)
    return tensor if _long_is_columns(shape) else tensor.T


def _directions(side: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(σ² in descending order, the singular vectors along the short side as rows)."""
    energies, vectors = np.linalg.eigh(side @ side.T)
    vectors = vectors.T[::-1]
    flipped = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, np.newaxis], axis=1) < 0
    energies = np.where(energies[::-1] > energies[-1] * 1e-12, energies[::-1], 0.0)  # what is left is rounding
    return energies, np.where(flipped, -vectors, vectors)  # a sign of their own: equal values give equal bytes


def _quantised(long: Float64Array) -> tuple[FloatArray, npt.NDArray[np.int8]]:
    """Scales (components, blocks), exact in bf16, and codes (components, length)."""
    blocks = np.pad(long, ((0, 0), (0, -long.shape[1] % LONG_BLOCK))).reshape(len(long), -1, LONG_BLOCK)
    largest = np.abs(blocks).max(axis=2)
    best_error = np.full(largest.shape, np.inf)
    best_scale = np.zeros(largest.shape, np.float32)
    best_codes = np.zeros(blocks.shape, np.int8)
    for clip in _CLIPS:
        scale = from_bf16(_bf16((largest * clip / nibbles.MAX_CODE).astype(np.float32)))
        divisor = np.where(scale > 0, scale, 1.0).astype(np.float64)[..., np.newaxis]
        codes = np.clip(np.rint(blocks / divisor), -nibbles.MAX_CODE, nibbles.MAX_CODE)
        error = ((codes * scale[..., np.newaxis] - blocks) ** 2).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes = np.where(better[..., np.newaxis], codes, best_codes).astype(np.int8)
    return best_scale, best_codes.reshape(len(long), -1)[:, : long.shape[1]]


def _long_values(codes: npt.NDArray[np.int8], scales: FloatArray) -> Float64Array:
    values: Float64Array = codes.astype(np.float64) * np.repeat(scales, LONG_BLOCK, axis=1)[:, : codes.shape[1]]
    return values


def _fitted(side: Float64Array, long: Float64Array) -> Float64Array:
    """Short vectors (components, short side) that come closest to ``side`` with these long ones."""
    # By the normal equations: long vectors are nearly at right angles, and there are few.
    return np.asarray(np.linalg.lstsq(long @ long.T, long @ side.T, rcond=None)[0], np.float64)


def _bf16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    return to_bf16(values.astype(np.float32))
