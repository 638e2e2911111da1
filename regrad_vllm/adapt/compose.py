"""The composition formula. It stands here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_SLICE_VALUES = 2**20  # worked on at once, so that w_k δ_k is never there as a whole


def compose(
    phi: NDArray[np.float32], deltas: Iterable[NDArray[np.float32]], weights: Sequence[float], gamma: float
) -> NDArray[np.float32]:
    """φ_q = φ* − γ Σ_k w_k δ_k

    phi and each delta: float32 (num_values,), in the learner's layout. The sum runs in the order given and
    in float32, so equal inputs give equal bits. Step sizes are already inside δ. Each delta is taken when its
    turn comes and not looked at again, so a generator may decode them into one buffer. Returns a new array, with
    Inf or NaN where the sum leaves float32; raises ValueError where shapes differ, or deltas and weights in number.
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
