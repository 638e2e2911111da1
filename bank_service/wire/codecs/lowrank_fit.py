"""Chooses the low-rank factors of a gradient, by the cost of leaving a direction out.

All computation is in float64. A tensor is turned to (short side, long side). Costs come from the learner's
``Sensitivity``. For a learner without one, the cost is the squared error.
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
MAX_COUNT = 255  # components of one tensor; a payload stores their number in a byte
# The share of a direction's cost that remains when its long vector has codes of two or four bits. Measured and rounded.
_LEFT_BY_TWO, _LEFT_BY_FOUR = 0.13, 0.013
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of a block's largest value that are tried for its step

Float64Array = npt.NDArray[np.float64]
Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a tensor: a long vector in codes, with a scale for each 128 of them, and a short vector."""

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
    """The directions of a tensor, those with the highest costs first."""

    def __init__(self, tensor: Float64Array, short_root: Float64Array | None, long_root: Float64Array | None) -> None:
        """``tensor``: (short side, long side). An error E of it costs ‖short_root · E · diag(long_root)‖².

        ``short_root``: (short side, short side). ``long_root``: (long side,).
        """
        self._tensor = tensor
        self._weights = np.ones(tensor.shape[1]) if long_root is None else long_root
        self._weighted = (tensor if short_root is None else short_root @ tensor) * self._weights
        costs, vectors = np.linalg.eigh(self._weighted @ self._weighted.T)
        vectors = vectors.T[::-1]
        flipped = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, np.newaxis], axis=1) < 0
        self._vectors = np.where(flipped, -vectors, vectors)  # a fixed sign, so that equal values give equal bytes
        # Smaller costs are rounding errors.
        self.costs: Float64Array = np.where(costs[::-1] > costs[-1] * 1e-12, costs[::-1], 0.0)

    def components(self, count: Count) -> list[Component]:
        """The directions with the highest costs, rounded. Their short vectors are the best for the rounded long
        vectors."""
        if not count.rank:
            return []
        # A value becomes 0 if its error costs nothing.
        weights = np.where(self._weights > 0, self._weights, np.inf)
        long = self._vectors[: count.rank] @ self._weighted / weights
        long /= np.abs(long).max(axis=1, keepdims=True)  # the unit of costs has no effect
        parts = ((long[: count.four], nibbles.MAX_CODE), (long[count.four :], crumbs.MAX_CODE))
        rounded = [each for rows, largest in parts if len(rows) for each in _quantised(rows, largest, self._weights)]
        values = np.stack([_values(codes, scales) for codes, scales in rounded]) * self._weights
        # Solved by the normal equations, which is exact enough: the few long vectors are nearly orthogonal. The result
        # is the best for any costs along the short side.
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
    """The numbers of components of each tensor, ``budget`` bytes in all. The best saving per byte is taken first.

    A direction first gets two bits per value. A strong direction then gets two more.
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
    """Rounds each row of ``long`` to codes (length,) and scales (blocks,), which are exact in bf16.

    Several scales are tried for each block. The one with the least error is taken.
    """
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
    """Rounds to the nearest code. Codes of two bits are odd numbers, so that all four of them are used."""
    if largest_code == crumbs.MAX_CODE:
        return 2 * np.floor(places / 2) + 1
    return np.rint(places)


def _values(codes: Int8Array, scales: FloatArray) -> Float64Array:
    return codes.astype(np.float64) * np.repeat(scales, LONG_BLOCK)[: len(codes)]


def _bf16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    return to_bf16(values.astype(np.float32))
