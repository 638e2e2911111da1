"""The documents of each row in one step, as the kernels of all layers read them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bank_service.wire.codecs.base import GradientFormatError
from bank_service.wire.codecs.factors import factor_form

# With so many rows of the same documents, composing a dense A and B for them costs less than reading codes row by row.
GROUP_ROWS = 12
MAX_FORMS = 64  # of a worker; a GPU's tables have room for them


class Forms:
    """The forms of factors that a worker has met. It grows. Thread-safe: kernels read while forms are added."""

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        """``shapes``: of the learner's tensors, in layout order."""
        self._shapes = shapes
        self._lock = threading.Lock()
        self._indices: dict[str, int] = {}
        self._kept: list[NDArray[np.int64]] = []  # a kernel may still read an older, shorter table
        self.tables: NDArray[np.int64] = np.empty((0, len(shapes), 7), np.int64)  # see ``FactorForm.table``
        self.bits: NDArray[np.int64] = np.empty(0, np.int64)  # of each form's codes
        self.addresses = (0, 0)  # of tables and bits

    def index(self, codec: str) -> int:
        """The index of a codec's form, the same ever after.

        GradientFormatError for a codec without factors, and for a new one after ``MAX_FORMS``.
        """
        with self._lock:
            found = self._indices.get(codec)
            if found is None:
                if len(self._indices) == MAX_FORMS:
                    raise GradientFormatError(
                        f"a worker must meet {MAX_FORMS} codecs at most, got {codec} besides; restart the server"
                    )
                form = factor_form(codec, self._shapes)
                self._kept += [self.tables, self.bits]
                self.tables = np.concatenate([self.tables, form.table[None]])
                self.bits = np.append(self.bits, np.int64(form.bits))
                self.addresses = self.tables.ctypes.data, self.bits.ctypes.data
                found = self._indices[codec] = len(self._indices)
            return found


@dataclass(frozen=True, eq=False)
class BatchDocuments:
    """The ReGrad rows of one step and their documents. It is the same for all layers."""

    num_rows: int  # tokens of the whole batch
    rows: NDArray[np.int64]  # (n,) token rows with ReGrad, ascending
    first: NDArray[np.int64]  # (n + 1,) documents of row i are first[i] … first[i+1]-1
    addresses: NDArray[np.int64]  # of each document's payload in memory
    coefficients: NDArray[np.float32]  # c = −γ w of each document
    forms: NDArray[np.int32]  # of each document, an index into ``Forms``

    def __post_init__(self) -> None:
        """ValueError if a type or a length is wrong, or a row lies outside the batch."""
        documents = len(self.addresses)
        for name, kind, size in (
            ("rows", np.int64, len(self.rows)), ("first", np.int64, len(self.rows) + 1),
            ("addresses", np.int64, documents), ("coefficients", np.float32, documents), ("forms", np.int32, documents),
        ):  # fmt: skip
            array = getattr(self, name)
            if array.dtype != kind or array.shape != (size,) or not array.flags.c_contiguous:
                raise ValueError(
                    f"{name} must be {size} contiguous values of {np.dtype(kind)}, got {array.shape} of {array.dtype}"
                )
        if len(self.rows) and not (
            self.rows[0] >= 0 and self.rows[-1] < self.num_rows and (self.rows[1:] > self.rows[:-1]).all()
        ):
            raise ValueError(f"rows must ascend and be below the batch's {self.num_rows}, got {self.rows}")
        if self.first[0] != 0 or self.first[-1] != documents or (np.diff(self.first) < 0).any():
            raise ValueError(f"first must ascend from 0 to the {documents} documents, got {self.first}")

    @cached_property
    def parameters(self) -> NDArray[np.int64]:
        """The addresses of rows, first, addresses, coefficients and forms, for the loops."""
        arrays = (self.rows, self.first, self.addresses, self.coefficients, self.forms)
        return np.array([array.ctypes.data for array in arrays], np.int64)

    @cached_property
    def address(self) -> int:
        """The address of ``parameters``."""
        return int(self.parameters.ctypes.data)

    @cached_property
    def others(self) -> tuple[int, int]:
        """The number and the address of the rows that belong to no group."""
        indices = self.grouped[1]
        return len(indices), int(indices.ctypes.data)

    @cached_property
    def run_starts(self) -> NDArray[np.int64]:
        """The first of each run of successive rows with the same documents, as indices into ``rows``, ascending."""
        counts = np.diff(self.first)
        starts = (np.diff(self.rows, prepend=-2) != 1) | (np.diff(counts, prepend=-1) != 0)
        row = np.repeat(np.arange(len(counts)), counts)  # of each document
        before = np.maximum(np.arange(len(row)) - counts[row], 0)  # the same place among those of the row before
        differs = np.zeros(len(row), bool)
        for values in (self.addresses, self.coefficients, self.forms):
            differs |= values != values[before]
        starts[row[differs]] = True
        return np.flatnonzero(starts)

    @cached_property
    def grouped(self) -> tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64]]:
        """Groups of at least ``GROUP_ROWS`` rows with the same documents, and all other rows.

        Each is an array of i, ascending, where the batch's row is ``rows[i]``.
        """
        num_rows = len(self.rows)
        if num_rows < GROUP_ROWS:
            return (), np.arange(num_rows)
        bounds = [*self.run_starts.tolist(), num_rows]
        alike: dict[bytes, list[NDArray[np.int64]]] = {}
        for start, stop in pairwise(bounds):
            own = slice(self.first[start], self.first[start + 1])
            key = b"".join(values[own].tobytes() for values in (self.addresses, self.coefficients, self.forms))
            alike.setdefault(key, []).append(np.arange(start, stop))
        groups, is_other = [], np.ones(num_rows, bool)
        for runs in alike.values():
            if sum(map(len, runs)) >= GROUP_ROWS:
                groups.append(np.concatenate(runs))
                is_other[groups[-1]] = False
        return tuple(groups), np.flatnonzero(is_other)
