"""The composition formula. It stands here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def compose(
    phi: NDArray[np.float32], deltas: Sequence[NDArray[np.float32]], weights: Sequence[float], gamma: float
) -> NDArray[np.float32]:
    """φ_q = φ* − γ Σ_k w_k δ_k

    phi and each delta: float32 (num_values,), in the learner's layout. The sum runs in the order given and
    in float32, so equal inputs give equal bits. Step sizes are already inside δ. Returns a new array; raises
    ValueError where shapes differ.
    """
    adapter = phi.copy()
    for delta, weight in zip(deltas, weights, strict=True):
        if delta.shape != phi.shape:
            raise ValueError(f"delta must have shape {phi.shape} like the learner, got {delta.shape}")
        adapter -= np.float32(gamma * weight) * delta
    return adapter
