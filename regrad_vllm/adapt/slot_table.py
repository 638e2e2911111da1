"""The places of a learner's values in a LoRA slot of this worker.

A flat vector holds A as (rank, in) and B as (out, rank). A slot holds both with the rank first, (rank, in) and
(rank, out), so that the loops read rows. If the slot's rank is higher than the learner's, the first rows have the
learner's values and the others zeros. With tensor parallelism a slot holds only this worker's shard of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrad_vllm.layout import Layout, LoraTensor, Part

# Columns of the table.
SOURCE, SOURCE_STRIDE, ROWS, COLUMNS, TARGET, TRANSPOSED, TENSOR = range(7)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one LoRA tensor that a worker computes with. It is a block of rows and columns."""

    rows: range
    columns: range

    def __post_init__(self) -> None:
        if self.rows.step != 1 or self.columns.step != 1 or not self.rows or not self.columns:
            raise ValueError(f"a shard must be rows and columns in one piece, got {self.rows}, {self.columns}")


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """One tensor in the row of a slot: this worker's A as (rank, in), or its B as (rank, out)."""

    module: str
    part: Part
    rank: int
    width: int  # this worker's inputs or outputs
    offset: int


@dataclass(frozen=True)
class SlotTable:
    """The blocks to copy from the flat vector into a slot's row.

    ``rows`` is int64 (tensors, 7). Its columns are:
    - SOURCE, SOURCE_STRIDE: the first value in the flat vector, and the distance between two rows there;
    - ROWS, COLUMNS: the size of the block;
    - TARGET: the first value in the slot's row;
    - TRANSPOSED: 1 if the copy transposes the block;
    - TENSOR: the tensor's index in the layout.
    """

    tensors: tuple[SlotTensor, ...]
    rows: NDArray[np.int64]
    num_values: int  # values of a slot's row

    @classmethod
    def build(cls, layout: Layout, shards: Mapping[tuple[str, Part], Shard], rank: int) -> SlotTable:
        """The table for slots of ``rank``. Tensors without a shard belong to another worker.

        ValueError if the slot's rank is below the learner's, or a shard exceeds its tensor.
        """
        if rank < layout.rank:
            raise ValueError(f"rank must be at least the learner's {layout.rank}, got {rank}")
        tensors: list[SlotTensor] = []
        rows: list[tuple[int, ...]] = []
        offset = 0
        for index, tensor in enumerate(layout.tensors):
            shard = shards.get((tensor.module, tensor.part))
            if shard is None:
                continue
            _check(shard, tensor)
            first = tensor.offset + shard.rows.start * tensor.shape[1] + shard.columns.start
            transposed = tensor.part == "B"
            rows.append((first, tensor.shape[1], len(shard.rows), len(shard.columns), offset, transposed, index))
            width = len(shard.rows) if transposed else len(shard.columns)
            tensors.append(SlotTensor(tensor.module, tensor.part, rank, width, offset))
            offset += rank * width
        assert len(tensors) == len(shards), "a shard would not be composed"
        return cls(tuple(tensors), np.array(rows, np.int64).reshape(-1, 7), offset)


def whole(layout: Layout) -> dict[tuple[str, Part], Shard]:
    """The shards of a worker without tensor parallelism: the whole tensors."""
    return {(t.module, t.part): Shard(range(t.shape[0]), range(t.shape[1])) for t in layout.tensors}


def _check(shard: Shard, tensor: LoraTensor) -> None:
    rank = shard.rows if tensor.part == "A" else shard.columns
    if len(rank) != (tensor.shape[0] if tensor.part == "A" else tensor.shape[1]):
        raise ValueError(f"a shard of {tensor.module} {tensor.part} must have the whole rank, got {rank}")
    if shard.rows.stop > tensor.shape[0] or shard.columns.stop > tensor.shape[1]:
        raise ValueError(f"a shard of {tensor.module} {tensor.part} must lie in {tensor.shape}, got {shard}")
