"""The cost of an error in a gradient. The low-rank codec keeps this cost small.

A small error of a gradient changes the answers. The size of the change is a quadratic form of the error, with the
Fisher information of the answers as its matrix. The full matrix would have as many rows as a gradient has values. So
each tensor has a Kronecker-factored matrix, as in K-FAC (Martens and Grosse, 2015). Its factors are a matrix S over the
short side, the rank, and a diagonal l over the long side. An error E (short side, long side) of a tensor costs
tr(S · E · diag(l) · Eᵀ).

``regrad sensitivity`` measures it once for a learner. It makes encoding better. Decoding does not need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

DAMPING = 0.1  # this share of the mean is added to every direction, so that unmeasured directions cost something
_ROUNDING = 1e-4  # of the greatest eigenvalue


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The two factors of each tensor, in layout order.

    ``short``: float32 (short side, short side), symmetric. ``long``: float32 (long side,).
    """

    short: tuple[FloatArray, ...]
    long: tuple[FloatArray, ...]

    def check(self, shapes: tuple[tuple[int, int], ...]) -> None:
        """ValueError if the factors don't fit tensors of these shapes."""
        if not len(self.short) == len(self.long) == len(shapes):
            raise ValueError(f"a sensitivity must have {len(shapes)} tensors, got {len(self.short)}, {len(self.long)}")
        for index, (short, long, shape) in enumerate(zip(self.short, self.long, shapes, strict=True)):
            if short.shape != (min(shape),) * 2 or long.shape != (max(shape),):
                raise ValueError(
                    f"tensor {index} of a sensitivity must have sides {min(shape)} and {max(shape)}, "
                    f"got {short.shape} and {long.shape}"
                )
            if not (np.isfinite(short).all() and np.isfinite(long).all() and (long >= 0).all()):
                raise ValueError(f"tensor {index} of a sensitivity must be finite, its long side not negative")
            values = np.linalg.eigvalsh(short.astype(np.float64))
            if np.abs(short - short.T).max() > _ROUNDING * values[-1] or values[0] < -_ROUNDING * values[-1]:
                raise ValueError(f"the short side of tensor {index} of a sensitivity must be symmetric, not negative")

    @cached_property
    def roots(self) -> tuple[tuple[Float64Array, Float64Array], ...]:
        """(H, d) for each tensor: an error E costs ‖H · E · diag(d)‖²."""
        return tuple(_root(short, long) for short, long in zip(self.short, self.long, strict=True))


def _root(short: FloatArray, long: FloatArray) -> tuple[Float64Array, Float64Array]:
    matrix = short.astype(np.float64)
    matrix = (matrix + matrix.T) / 2
    damped = matrix + np.eye(len(matrix)) * (DAMPING * np.trace(matrix) / len(matrix))
    values, vectors = np.linalg.eigh(damped)
    weights = long.astype(np.float64)
    weights = (1 - DAMPING) * weights + DAMPING * weights.mean()
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T, np.sqrt(weights)
