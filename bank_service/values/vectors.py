"""Embeddings as arrays, and the row keys that name them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bank_service.wire.record import FloatArray

KeyArray = npt.NDArray[np.int64]


def unit(vectors: FloatArray) -> FloatArray:
    """Scales ``vectors``, float32 (…, dimension), to L2 norm 1 each."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    result: FloatArray = (vectors / norms).astype(np.float32)
    return result
