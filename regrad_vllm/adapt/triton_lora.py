"""LoRA in a batch's linear layers on a GPU, for batches in which nearly every request has another adapter.

vLLM's own kernels (``lora/ops/triton_ops``) launch a program for each block of rows, block of outputs, slice and
*slot*. If every row has another adapter, nearly all programs have nothing to do, and together they cost more than the
base model. Here the rows that share an adapter are cut into tiles, listed once per step. A program computes one tile.

There are two launches per layer. ``_shrink`` multiplies by A. It is split along the inputs, so that a few rows keep the
device busy too. ``_expand`` sums the splits in a fixed order, multiplies by B and adds to the base layer's output. Sums
are float32. A x is rounded to the slots' type before B, as in vLLM's kernels and PEFT. There are no atomic operations,
so an equal batch gives equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from regrad_vllm.adapt.triton_compose import TYPES

TILE_ROWS = 16  # the fewest rows that a tensor core multiplies
MAX_RANK = 64  # a program holds the whole rank of its factors; a higher rank would not fit
_SPLITS = 8  # parts of the inputs
_BLOCK_IN, _BLOCK_OUT = 128, 256
_TILE_FIELDS, _SLICE_FIELDS = 3, 6


class Tiles:
    """The tiles of the batch, on the device: the rows of each slot. They are the same for all layers of one step.

    The tensors are written in place, so that CUDA graphs may read them.
    """

    def __init__(self, max_rows: int, max_adapters: int, device: torch.device) -> None:
        """The tiles for batches of at most ``max_rows`` rows with at most ``max_adapters`` different adapters."""
        self._max_adapters = max_adapters
        self.table = torch.full((-(-max_rows // TILE_ROWS) + max_adapters, _TILE_FIELDS), -1, dtype=torch.int32).to(
            device
        )
        self.order = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.is_empty = torch.ones(1, dtype=torch.bool)  # on the host: no row has an adapter

    def update(self, slots: NDArray[np.int64]) -> None:
        """Writes the tiles of a batch on the current stream. ValueError for too many rows or adapters.

        slots: the slot of each row, −1 for a row without an adapter.
        """
        order = np.argsort(slots, kind="stable").astype(np.int32)
        ordered = slots[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-2))
        lengths = np.diff(starts, append=len(slots))
        adapted = ordered[starts] >= 0
        starts, lengths = starts[adapted], lengths[adapted]
        if len(starts) > self._max_adapters or len(slots) > len(self.order):
            raise ValueError(
                f"a batch must have {self._max_adapters} adapters and {len(self.order)} rows at most, "
                f"got {len(starts)} and {len(slots)}"
            )
        counts = -(-lengths // TILE_ROWS)
        group = np.repeat(np.arange(len(starts)), counts)
        begin = TILE_ROWS * (np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts))
        table = np.full(tuple(self.table.shape), -1, np.int32)
        table[: len(group), 0] = ordered[starts[group]]
        table[: len(group), 1] = starts[group] + begin
        table[: len(group), 2] = np.minimum(TILE_ROWS, lengths[group] - begin)
        self._copy(self.table, table)  # also if it is empty, because a captured graph doesn't look at ``is_empty``
        self._copy(self.order[: len(order)], order)
        self.is_empty[0] = not len(starts)

    @staticmethod
    def _copy(target: Tensor, values: NDArray[np.int32]) -> None:
        host = torch.from_numpy(values)
        if target.device.type == "cuda":
            host = host.pin_memory()  # its allocator keeps it until the copy is done
        target.copy_(host, non_blocking=True)

    def max_tiles(self, num_rows: int) -> int:
        """The most tiles that a batch of ``num_rows`` rows can have."""
        return min(len(self.table), num_rows // TILE_ROWS + min(num_rows, self._max_adapters))


@dataclass(frozen=True, slots=True)
class _Layer:
    slices: Tensor  # int64 (slices, _SLICE_FIELDS) on the device
    inputs: int
    rank: int
    outputs: int  # outputs of the widest slice
    width: int  # outputs of all slices together


LAYERS: dict[tuple[object, ...], _Layer] = {}  # by the addresses and shapes of vLLM's stacks


def add_lora(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], output_slices: Sequence[int], table: Tensor,
    order: Tensor, is_empty: Tensor, max_tiles: int,
) -> None:  # fmt: skip
    """y[row] += B[slot] (A[slot] x[row]) for each row with an adapter, slice by slice. Other rows are not changed.

    - y: (rows, outputs), x: (rows, inputs), with contiguous rows.
    - a: (slots, 1, rank, inputs), b: (slots, 1, outputs, rank), for each slice. The rank is at most MAX_RANK.
    - table, order, is_empty: from ``Tiles``. Rows of its batch that x doesn't have are ignored.
    - max_tiles: ``Tiles.max_tiles`` for at least the rows of x.

    ValueError for wrong shapes.
    """
    if is_empty.item() or not x.shape[0]:
        return
    layer = _layer(a, b, output_slices)
    wanted = (x.shape[0], layer.inputs), (x.shape[0], layer.width)
    if (x.shape, y.shape) != wanted or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x and y must be {wanted} of contiguous rows, got {x.shape} and {y.shape}")
    num_slices, block_rank = len(a), max(16, triton.next_power_of_2(layer.rank))
    low = torch.empty((_SPLITS, num_slices, x.shape[0], block_rank), dtype=torch.float32, device=x.device)
    constants = {
        "DTYPE": TYPES[a[0].dtype], "RANK": layer.rank, "BLOCK_RANK": block_rank, "ROWS": TILE_ROWS,
        "SPLITS": _SPLITS, "TILE": _TILE_FIELDS, "SLICE": _SLICE_FIELDS,
        "PRECISION": "ieee" if torch.float32 in (a[0].dtype, x.dtype) else "tf32",  # holds the two-byte types
    }  # fmt: skip
    _shrink[(max_tiles, _SPLITS, num_slices)](
        x, low, layer.slices, table, order, x.shape[0], layer.inputs, x.stride(0), BLOCK=_BLOCK_IN, **constants
    )
    _expand[(max_tiles, triton.cdiv(layer.outputs, _BLOCK_OUT), num_slices)](
        y, low, layer.slices, table, order, x.shape[0], y.stride(0), BLOCK=_BLOCK_OUT, **constants
    )


def _layer(a: Sequence[Tensor], b: Sequence[Tensor], output_slices: Sequence[int]) -> _Layer:
    key = (*output_slices, *((stack.data_ptr(), stack.shape, stack.stride(), stack.dtype) for stack in (*a, *b)))
    found = LAYERS.get(key)
    if found is None:
        for stack in (*a, *b):
            if stack.ndim != 4 or stack.shape[1] != 1 or not stack[0, 0].is_contiguous():
                raise ValueError(f"a stack must be (slots, 1, rows, columns), got {stack.shape} by {stack.stride()}")
        offsets = np.cumsum([0, *output_slices[:-1]])
        rows = [
            [of_a.data_ptr(), of_a.stride(0), of_b.data_ptr(), of_b.stride(0), outputs, int(offset)]
            for of_a, of_b, outputs, offset in zip(a, b, output_slices, offsets, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.int64).to(a[0].device)
        found = LAYERS[key] = _Layer(table, a[0].shape[3], a[0].shape[2], max(output_slices), sum(output_slices))
    return found


@triton.jit(do_not_specialize=["num_rows"])
def _shrink(  # type: ignore[no-untyped-def]  # noqa: ANN202  # addresses, but for the numbers and constants
    x, low, slices, tiles, order, num_rows, inputs, x_stride,  # noqa: ANN001
    DTYPE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + TILE * tile)
    if slot >= 0:
        here = tl.arange(0, ROWS) < tl.load(tiles + TILE * tile + 2)
        row = tl.load(order + tl.load(tiles + TILE * tile + 1) + tl.arange(0, ROWS), mask=here, other=0)
        here = here & (row < num_rows)
        rank = tl.arange(0, BLOCK_RANK)
        a = tl.load(slices + SLICE * part).to(tl.pointer_type(DTYPE)) + slot * tl.load(slices + SLICE * part + 1)
        share = (inputs + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
        end = tl.minimum(inputs, (split + 1) * share)
        total = tl.full((ROWS, BLOCK_RANK), 0.0, tl.float32)
        for start in range(split * share, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(
                x + row.to(tl.int64)[:, None] * x_stride + column[None, :],
                mask=here[:, None] & (column < end)[None, :], other=0.0,
            )  # fmt: skip
            factors = tl.load(
                a + rank[None, :] * inputs + column[:, None],
                mask=(rank < RANK)[None, :] & (column < end)[:, None], other=0.0,
            )  # fmt: skip
            total += tl.dot(values.to(tl.float32), factors.to(tl.float32), input_precision=PRECISION)
        place = (split * tl.num_programs(2) + part) * num_rows + row
        tl.store(low + place.to(tl.int64)[:, None] * BLOCK_RANK + rank[None, :], total, mask=here[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _expand(  # type: ignore[no-untyped-def]  # noqa: ANN202  # addresses, but for the numbers and constants
    y, low, slices, tiles, order, num_rows, y_stride,  # noqa: ANN001
    DTYPE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(2)
    slot = tl.load(tiles + TILE * tile)
    outputs = tl.load(slices + SLICE * part + 4)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if (slot >= 0) & (tl.program_id(1) * BLOCK < outputs):
        here = tl.arange(0, ROWS) < tl.load(tiles + TILE * tile + 2)
        row = tl.load(order + tl.load(tiles + TILE * tile + 1) + tl.arange(0, ROWS), mask=here, other=0)
        here = here & (row < num_rows)
        rank = tl.arange(0, BLOCK_RANK)
        shrunk = tl.full((ROWS, BLOCK_RANK), 0.0, tl.float32)
        for split in tl.static_range(SPLITS):
            place = (split * tl.num_programs(2) + part) * num_rows + row
            shrunk += tl.load(
                low + place.to(tl.int64)[:, None] * BLOCK_RANK + rank[None, :], mask=here[:, None], other=0.0
            )
        b = tl.load(slices + SLICE * part + 2).to(tl.pointer_type(DTYPE)) + slot * tl.load(slices + SLICE * part + 3)
        factors = tl.load(
            b + column[None, :] * RANK + rank[:, None],
            mask=(rank < RANK)[:, None] & (column < outputs)[None, :], other=0.0,
        )  # fmt: skip
        shrunk = shrunk.to(DTYPE).to(tl.float32)
        added = tl.dot(shrunk, factors.to(tl.float32), input_precision=PRECISION)
        place = y + row.to(tl.int64)[:, None] * y_stride + tl.load(slices + SLICE * part + 5) + column[None, :]
        mask = here[:, None] & (column < outputs)[None, :]
        before = tl.load(place, mask=mask, other=0.0)
        tl.store(place, (before.to(tl.float32) + added).to(before.dtype), mask=mask)
