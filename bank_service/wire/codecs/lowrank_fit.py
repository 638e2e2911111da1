"""Chooses the low-rank factors that a gradient is kept as, by the cost of leaving a direction out.

All of it is in float64, of a tensor as (short side, long side). Costs come from the learner's ``Sensitivity``. For a
learner without one, the cost is the squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs import crumbs, nibbles
from bank_service.wire.codecs.base import FloatArray, GradientSpec
from bank_service.wire.codecs.blocks import from_bf16, to_bf16

LONG_BLOCK = 128
MAX_COUNT = 255  # of one tensor's components: their number is a byte
# The share of a direction's cost that is left when its long vector has codes of two or four bits; measured, rounded.
_LEFT_BY_TWO, _LEFT_BY_FOUR = 0.13, 0.013
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the largest value in a block, tried for its step

Float64Array = npt.NDArray[np.float64]
Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a tensor: a long vector as codes, with a scale for each 128, and the short vector beside it."""

    codes: Int8Array
    scales: npt.NDArray[np.uint16]  # bf16
    short: npt.NDArray[np.uint16]  # bf16


@dataclass(frozen=True, slots=True)
class Count:
    """A tensor's components: the first have codes of four bits, the others of two."""

    four: int
    two: int

    @property
    def rank(self) -> int:
        return self.four + self.two


class Directions:
    """The directions of a tensor. The one that costs most to leave out comes first."""

    def __init__(self, tensor: Float64Array, short_root: Float64Array | None, long_root: Float64Array | None) -> None:
        """tensor: (short side, long side). An error E of it costs ‖short_root · E · diag(long_root)‖²."""
        self._tensor = tensor
        self._weights = np.ones(tensor.shape[1]) if long_root is None else long_root
        self._weighted = (tensor if short_root is None else short_root @ tensor) * self._weights
        costs, vectors = np.linalg.eigh(self._weighted @ self._weighted.T)
        vectors = vectors.T[::-1]
        flipped = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, np.newaxis], axis=1) < 0
        self._vectors = np.where(flipped, -vectors, vectors)  # the sign is fixed: equal values give equal bytes
        self.costs: Float64Array = np.where(costs[::-1] > costs[-1] * 1e-12, costs[::-1], 0.0)  # the rest is rounding

    def components(self, count: Count) -> list[Component]:
        """The directions that cost most, rounded. Their short vectors are the best ones for the rounded long ones."""
        if not count.rank:
            return []
        # Where an error costs nothing, the value becomes 0.
        weights = np.where(self._weights > 0, self._weights, np.inf)
        long = self._vectors[: count.rank] @ self._weighted / weights
        long /= np.abs(long).max(axis=1, keepdims=True)  # the unit of costs has no effect
        parts = ((long[: count.four], nibbles.MAX_CODE), (long[count.four :], crumbs.MAX_CODE))
        rounded = [each for rows, largest in parts if len(rows) for each in _quantised(rows, largest, self._weights)]
        values = np.stack([_values(codes, scales) for codes, scales in rounded]) * self._weights
        # By the normal equations: the few long vectors are nearly at right angles. These short vectors are the best
        # ones for any costs along the short side.
        shorts = np.linalg.lstsq(values @ values.T, values @ (self._tensor * self._weights).T, rcond=None)[0]
        return [
            Component(codes, _bf16(scales), _bf16(short))
            for (codes, scales), short in zip(rounded, shorts, strict=True)
        ]


def directions_of(values: FloatArray, spec: GradientSpec) -> list[Directions]:
    found, start = [], 0
    for index, (rows, columns) in enumerate(spec.shapes):
        tensor = values[start : start + rows * columns].reshape(rows, columns).astype(np.float64)
        short, long = (None, None) if spec.sensitivity is None else spec.sensitivity.roots[index]
        found.append(Directions(tensor if long_is_columns((rows, columns)) else tensor.T, short, long))
        start += rows * columns
    return found


def chosen(directions: Sequence[Directions], shapes: Sequence[tuple[int, int]], budget: int) -> list[Count]:
    """The number of components of each tensor. What saves most for each byte comes first, while ``budget`` bytes last.

    A direction gets two bits a value first. A strong one then gets two more.
    """
    sizes = [(component_bytes(shape, 2), component_bytes(shape, 4) - component_bytes(shape, 2)) for shape in shapes]
    options = []
    for index, (own, (first, more)) in enumerate(zip(directions, sizes, strict=True)):
        for cost in own.costs[own.costs > 0]:
            options.append((-float(cost) * (1 - _LEFT_BY_TWO) / first, index, False))
            options.append((-float(cost) * (_LEFT_BY_TWO - _LEFT_BY_FOUR) / max(more, 1), index, True))
    ranks, fours = [0] * len(shapes), [0] * len(shapes)
    for _, index, is_more in sorted(options):  # within one tensor, the strongest come first
        size = sizes[index][is_more]
        if size <= budget and (fours[index] < ranks[index] if is_more else ranks[index] < MAX_COUNT):
            budget -= size
            if is_more:
                fours[index] += 1
            else:
                ranks[index] += 1
    return [Count(four, rank - four) for four, rank in zip(fours, ranks, strict=True)]


def component_bytes(shape: tuple[int, int], bits: int) -> int:
    codes = nibbles.num_bytes(max(shape)) if bits == 4 else crumbs.num_bytes(max(shape))
    return 2 * -(-max(shape) // LONG_BLOCK) + 2 * min(shape) + codes


def long_is_columns(shape: tuple[int, int]) -> bool:
    return shape[1] >= shape[0]


def _quantised(long: Float64Array, largest_code: int, weights: Float64Array) -> list[tuple[Int8Array, FloatArray]]:
    """For each row codes (length,) and scales (blocks,), exact in bf16. Of some scales, those with the least error."""
    length = long.shape[1]
    padding = -length % LONG_BLOCK
    blocks = np.pad(long, ((0, 0), (0, padding))).reshape(len(long), -1, LONG_BLOCK)
    counted = np.pad(weights**2, (0, padding)).reshape(-1, LONG_BLOCK)
    largest = np.abs(blocks).max(axis=2)
    best_error = np.full(largest.shape, np.inf)
    best_scale = np.zeros(largest.shape, np.float32)
    best_codes = np.zeros(blocks.shape, np.int8)
    for clip in _CLIPS:
        scale = from_bf16(_bf16(largest * clip / largest_code))
        places = blocks / np.where(scale > 0, scale, 1.0).astype(np.float64)[..., np.newaxis]
        codes = np.clip(_nearest_code(places, largest_code), -largest_code, largest_code)
        error = np.einsum("cbj,bj->cb", (codes * scale[..., np.newaxis] - blocks) ** 2, counted)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes = np.where(better[..., np.newaxis], codes, best_codes).astype(np.int8)
    return list(zip(best_codes.reshape(len(long), -1)[:, :length], best_scale, strict=True))


def _nearest_code(places: Float64Array, largest_code: int) -> Float64Array:
    """Codes of two bits are odd: all four of them are of use then."""
    if largest_code == crumbs.MAX_CODE:
        return 2 * np.floor(places / 2) + 1
    return np.rint(places)


def _values(codes: Int8Array, scales: FloatArray) -> Float64Array:
    return codes.astype(np.float64) * np.repeat(scales, LONG_BLOCK)[: len(codes)]


def _bf16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    return to_bf16(values.astype(np.float32))
