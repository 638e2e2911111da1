"""φ* and the documents in one linear layer of a CUDA GPU: two launches of the kernels in ``triton_documents``.

The grid and the constants depend on the layer and on the number of rows alone, so a CUDA graph can hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from regrad_vllm.serve.kernels import triton_documents
from regrad_vllm.serve.kernels.device_tables import DeviceTables
from regrad_vllm.serve.kernels.layer_slice import LayerSlice

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BLOCK = 128  # codes for one scale
_FEW_ROWS = 8  # up to so many rows each gets programs of its own
_DECODE_ROWS = 16  # of a tile with more rows
_SUMMED_VALUES = 4096  # partial sums that a program loads at once
_PROGRAMS = 528  # four for each multiprocessor of an H200: so many are wanted, if there is work for them


class DeviceLayer:
    """A linear layer with ReGrad. Its tables and its copy of φ* stay at their addresses."""

    def __init__(self, slices: Sequence[LayerSlice], scaling: float, tables: DeviceTables, dtype: torch.dtype) -> None:
        """``slices``: of the layer, in the order of y's columns, at least one with φ*. ``scaling``: lora_alpha / R.

        φ* is rounded to ``dtype``. ValueError for slices that don't fit together.
        """
        adapted = [piece for piece in slices if piece.a is not None]
        first = adapted[0]
        assert first.a is not None
        rank, self._inputs = first.a.shape
        self._tables, self._rank, self._scaling, self._dtype = tables, rank, scaling, dtype
        self._device = tables.rows.device
        self._block_rank = min(64, max(16, triton.next_power_of_2(rank)))
        self._rank_blocks = triton.next_power_of_2(-(-rank // self._block_rank))
        self._padded = self._block_rank * self._rank_blocks
        self._kept: list[Tensor] = []  # φ*'s factors
        offsets = np.cumsum([0, *(piece.outputs for piece in slices)])
        fields = [self._fields(piece, int(offset)) for piece, offset in zip(slices, offsets, strict=False)]
        self.width = int(offsets[-1])
        self._outputs = max(piece.first_output % _BLOCK + piece.outputs for piece in slices)
        self._first_input = first.first_input
        self._slices = torch.tensor(fields, dtype=torch.int64).to(self._device)
        sizes = [self._inputs, *(size for row in fields for size in row[4:])]
        sizes += [size for piece in adapted for size in piece.whole]  # a component's codes have this length
        self._is_aligned = all(size % 16 == 0 for size in sizes)
        self._is_even = all(size % _BLOCK == 0 for size in sizes)
        self._fits_two_blocks = not self._is_even or all(piece.outputs % (2 * _BLOCK) == 0 for piece in slices)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y[row] += φ*'s and the documents' part, for each ReGrad row of the step. Other rows are not changed.

        y: (rows, outputs of all slices), x: (rows, inputs), with contiguous rows. Rows that the step doesn't have are
        padding. ValueError for other shapes.
        """
        num_rows = x.shape[0]
        wanted = (num_rows, self._inputs), (num_rows, self.width)
        if (tuple(x.shape), tuple(y.shape)) != wanted or x.stride(1) != 1 or y.stride(1) != 1:
            raise ValueError(f"x and y must be {wanted} of contiguous rows, got {tuple(x.shape)} and {tuple(y.shape)}")
        tables = self._tables
        if num_rows > tables.max_rows:
            raise ValueError(f"a step must have {tables.max_rows} rows at most, got {num_rows}")
        if not num_rows:
            return
        is_tiled = num_rows > tables.max_requests
        tile = tables.tile_rows if is_tiled else 1 if num_rows <= _FEW_ROWS else _DECODE_ROWS
        num_tiles = tables.num_tiles(num_rows) if is_tiled else triton.cdiv(num_rows, tile)
        num_slices = len(self._slices)
        splits, share = self._split(num_tiles * num_slices * self._rank_blocks)
        width = self._width(num_tiles * num_slices, can_be_wide=tile == _DECODE_ROWS and not is_tiled)
        low = torch.empty((splits, num_slices, num_rows, self._padded), dtype=torch.float32, device=x.device)
        is_aligned = self._is_aligned and x.stride(0) % 16 == 0 and y.stride(0) % 16 == 0
        constants = {
            "DTYPE": TYPES[self._dtype], "RANK": self._rank, "BLOCK_RANK": self._block_rank,
            "RANK_BLOCKS": self._rank_blocks, "ROWS": tile, "TILED": is_tiled, "TENSORS": tables.num_tensors,
            "EVEN": self._is_even, "ALIGNED": is_aligned, "EXACT": torch.float32 in (self._dtype, x.dtype),
        }  # fmt: skip
        places = self._slices, tables.forms, tables.rows, tables.documents, tables.tiles, num_rows
        triton_documents.shrink[(num_tiles, splits, num_slices * self._rank_blocks)](
            x, low, *places, self._inputs, x.stride(0), share, num_warps=4, **constants
        )
        triton_documents.expand[(num_tiles, triton.cdiv(self._outputs, width), num_slices)](
            y, low, *places, y.stride(0), splits, self._scaling, WIDTH=width, SPLITS=triton.next_power_of_2(splits),
            SOME=min(triton.next_power_of_2(splits), max(1, _SUMMED_VALUES // (tile * self._padded))),
            num_warps=8 if tile * max(width, self._padded) >= 4096 else 4, **constants,
        )  # fmt: skip

    def _split(self, num_programs: int) -> tuple[int, int]:
        """(splits, blocks of inputs in each): enough programs, but no more partial sums than that needs."""
        blocks = triton.cdiv(self._first_input % _BLOCK + self._inputs, _BLOCK)
        share = max(1, triton.cdiv(blocks * num_programs, _PROGRAMS))
        return triton.cdiv(blocks, share), share

    def _width(self, num_programs: int, *, can_be_wide: bool) -> int:
        """The outputs of a program: one block of codes; two if there are enough programs for that."""
        enough = num_programs * triton.cdiv(self._outputs, 2 * _BLOCK) >= _PROGRAMS
        return 2 * _BLOCK if can_be_wide and enough and self._fits_two_blocks else _BLOCK

    def _fields(self, piece: LayerSlice, offset: int) -> list[int]:
        """The slice's row in the kernels' table: addresses, tensors, first input and output, outputs, place in y."""
        if piece.a is None or piece.b is None:
            return [0, 0, -1, -1, 0, 0, piece.outputs, offset]
        if piece.a.shape != (self._rank, self._inputs) or piece.b.shape != (piece.outputs, self._rank):
            raise ValueError(
                f"φ* must be ({self._rank}, {self._inputs}) and ({piece.outputs}, {self._rank}), "
                f"got {tuple(piece.a.shape)} and {tuple(piece.b.shape)}"
            )
        a = torch.zeros(self._padded, self._inputs, dtype=self._dtype, device=self._device)
        b = torch.zeros(self._padded, piece.outputs, dtype=self._dtype, device=self._device)
        a[: self._rank], b[: self._rank] = piece.a, (piece.b * self._scaling).T
        self._kept += [a, b]
        return [
            a.data_ptr(), b.data_ptr(), piece.tensor_a, piece.tensor_b, piece.first_input, piece.first_output,
            piece.outputs, offset,
        ]  # fmt: skip


def tile_rows(rank: int) -> int:
    """The rows of a tile in prefill, so that a tile's h fits into registers."""
    return max(16, min(64, 4096 // int(triton.next_power_of_2(rank))))
