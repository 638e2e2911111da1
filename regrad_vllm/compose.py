"""The composition formula, in its reference implementation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_SLICE_VALUES = 2**20  # values at a time, so that the whole of w_k δ_k is never in memory


def compose(
    phi: NDArray[np.float32], deltas: Iterable[NDArray[np.float32]], weights: Sequence[float], gamma: float
) -> NDArray[np.float32]:
    """φ_q = φ* − γ Σ_k w_k δ_k

    phi and each delta: float32 (num_values,), in the learner's layout. δ contains the step sizes already. The sum runs
    in the given order and in float32, so equal inputs give equal bits. Each delta is read once and in order, so a
    generator may decode them all into one buffer.

    Returns a new array. A value outside float32 becomes Inf or NaN. ValueError if the shapes differ, or the numbers of
    deltas and weights.
    """
    adapter = phi.copy()
    for delta, weight in zip(deltas, weights, strict=True):
        if delta.shape != phi.shape:
            raise ValueError(f"delta must have shape {phi.shape} like the learner, got {delta.shape}")
        step = np.float32(gamma * weight)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, adapter.size, _SLICE_VALUES):
                part = slice(start, start + _SLICE_VALUES)
                adapter[part] -= step * delta[part]
    return adapter
