"""A document's gradient in the form that the compiled loops read: still encoded, by its address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

INT8, BF16, FLOAT32, FACTORS = range(4)  # the form of the values in memory
# The fields of a gradient's row for the loops: its kind, and the addresses of its arrays. 0 means that it has none.
KIND, VALUES, SCALES, SHORTS, TABLE = range(5)
ROW_FIELDS = 5
Values = NDArray[Any] | torch.Tensor


@dataclass(frozen=True, slots=True)
class Payload:
    """A record's values in the form that the loops read, as contiguous arrays in the host's memory."""

    kind: int
    values: NDArray[Any]  # int8 codes, bf16 halves, float32
    scales: NDArray[np.float32] | None = None  # the scales of codes
    shorts: NDArray[np.float32] | None = None  # the short vectors of factors
    table: NDArray[np.int64] | None = None  # the table of factors

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """The arrays that this kind has, in order."""
        return [array for array in (self.values, self.scales, self.shorts, self.table) if array is not None]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class StoredGradient:
    """One document's δ in memory, in one of four forms:

    - int8 codes, with a float32 scale for each 64 codes;
    - bf16 bits as uint16;
    - float32;
    - low-rank factors: codes with a float32 scale for each 128, short vectors in float32, and a table.
    """

    __slots__ = ("_kept", "row")

    def __init__(self, kind: int, arrays: Sequence[Values]) -> None:
        """arrays: the arrays of a ``Payload``, on the host or on a device."""
        addresses = [_address(array) for array in arrays]
        self.row = (kind, *addresses, *[0] * (ROW_FIELDS - 1 - len(addresses)))
        self._kept = tuple(arrays)


def _address(values: Values) -> int:
    return int(values.data_ptr() if isinstance(values, torch.Tensor) else values.ctypes.data)
