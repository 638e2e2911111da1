"""The best components of tensors, rounded to codes. All computation is in float64.

A component is a long vector times a short vector. The best components of a tensor are those of its singular value
decomposition. It comes from the eigenvectors of the small matrix T · Tᵀ, because the short side is small.

Two errors add up: the components left out, and the rounding of long vectors. So the short vectors are fitted to the
rounded long vectors by least squares. Last, they are rounded to bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.bf16 import from_bf16, to_bf16

BLOCK = 128  # codes of a component with one scale
MAX_CODES = {8: 127, 4: 7}  # by the number of bits
# Shares of a block's largest value that the largest code can stand for. The one with the least error is chosen.
_CLIPS = {8: (1.0,), 4: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}
_NO_ENERGY = 1e-12  # of the strongest component; what is below is a rounding error

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Components:
    """The components of ``n`` tensors of equal shape, those with the most energy first."""

    codes: npt.NDArray[np.int8]  # (n, count, long)
    scales: npt.NDArray[np.uint16]  # bf16 (n, count, blocks)
    shorts: npt.NDArray[np.uint16]  # bf16 (n, count, short)


def fitted(tensors: Float64Array, count: int, bits: int) -> Components:
    """``tensors``: (n, short, long). ``count`` is at most the smaller side. Equal tensors give equal components."""
    energies, vectors = np.linalg.eigh(tensors @ tensors.swapaxes(1, 2))
    vectors = vectors.swapaxes(1, 2)[:, ::-1][:, :count]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=2)[..., np.newaxis], axis=2)
    vectors = np.where(largest < 0, -vectors, vectors)  # an eigenvector has no sign of its own
    counts_for_something = energies[:, ::-1][:, :count] > energies[:, -1:] * _NO_ENERGY
    long = (vectors @ tensors) * counts_for_something[..., np.newaxis]
    # Long vectors have a largest value of 1, whatever the size of the gradient. The short vectors carry the size.
    peaks = np.abs(long).max(axis=2, keepdims=True)
    codes, scales = _rounded(np.divide(long, peaks, out=np.zeros_like(long), where=peaks > 0), bits)
    values = codes * np.repeat(scales.astype(np.float64), BLOCK, axis=2)[..., : long.shape[2]]
    # Rounded vectors are nearly at right angles. The pseudo-inverse also serves those that are zero or equal.
    inverse = np.linalg.pinv(values @ values.swapaxes(1, 2), rcond=1e-10, hermitian=True)
    shorts = inverse @ (values @ tensors.swapaxes(1, 2))
    return Components(codes, to_bf16(scales), to_bf16(shorts.astype(np.float32)))


def _rounded(long: Float64Array, bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes of ``long``'s shape (n, count, long), and scales (n, count, blocks), which are exact in bf16."""
    length = long.shape[2]
    blocks = np.pad(long, ((0, 0), (0, 0), (0, -length % BLOCK))).reshape(*long.shape[:2], -1, BLOCK)
    largest = np.abs(blocks).max(axis=3)
    best_error = np.full(largest.shape, np.inf)
    best_scales = np.zeros(largest.shape, np.float32)
    best_codes = np.zeros(blocks.shape, np.int8)
    for clip in _CLIPS[bits]:
        scales = from_bf16(to_bf16((largest * clip / MAX_CODES[bits]).astype(np.float32)))
        steps = scales.astype(np.float64)[..., np.newaxis]
        codes = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
        np.clip(np.rint(codes, out=codes), -MAX_CODES[bits], MAX_CODES[bits], out=codes)
        if len(_CLIPS[bits]) == 1:
            best_codes, best_scales = codes.astype(np.int8), scales
            break
        error = ((codes * steps - blocks) ** 2).sum(axis=3)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
        best_codes[better] = codes[better]
    return best_codes.reshape(*long.shape[:2], -1)[..., :length], best_scales
