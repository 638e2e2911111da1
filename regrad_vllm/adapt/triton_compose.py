"""Composes into vLLM's stacked LoRA tensors on a GPU, with one Triton launch for all tensors of a slot.

Each value has the same operations in the same order as in ``adapt.compose.compose``, without fused multiply-adds. Then
B is multiplied by the scaling, and the value is rounded once to the slot's type. So a float32 slot has exactly the bits
of the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bank_service.wire.codecs.dense import INT8_BLOCK
from bank_service.wire.codecs.lowrank import TABLE_FIELDS
from bank_service.wire.codecs.lowrank_fit import LONG_BLOCK
from regrad_vllm.adapt.stored_gradient import BF16, FACTORS, INT8, ROW_FIELDS

_BLOCK = 2048  # values that one program composes
_FIELDS = 9


@dataclass(frozen=True, slots=True)
class Target:
    """One LoRA tensor on this worker, with the source of its values in the flat vector."""

    first: int  # index of its first value in the flat vector
    stride: int  # distance between two of its rows there
    stack: Tensor  # (slots, 1, rows, columns at least), rows contiguous
    rows: int
    columns: int
    scaled: bool
    tensor: int  # its index in the layout


class LaunchTable:
    """The targets as a table for the kernel, on their device."""

    def __init__(self, targets: Sequence[Target], device: torch.device) -> None:
        """ValueError if a stack is too small for its target, or its rows aren't contiguous."""
        rows, tiles = [], []
        for index, target in enumerate(targets):
            stack = target.stack
            if stack.ndim != 4 or stack.shape[1] != 1 or stack.stride(3) != 1:
                raise ValueError(f"a stack must be (slots, 1, rows, columns), got {stack.shape} by {stack.stride()}")
            if stack.shape[2] < target.rows or stack.shape[3] < target.columns:
                raise ValueError(f"a stack must hold {target.rows} × {target.columns}, got {stack.shape}")
            rows.append(
                [target.first, target.stride, target.rows * target.columns, target.columns, stack.data_ptr(),
                 stack.stride(0), stack.stride(2), int(target.scaled), target.tensor]
            )  # fmt: skip
            tiles += [[index, start] for start in range(0, target.rows * target.columns, _BLOCK)]
        self.num_tiles = len(tiles)
        self.targets = torch.tensor(rows, dtype=torch.int64).to(device)
        self.tiles = torch.tensor(tiles, dtype=torch.int64).to(device)


def launch(
    table: LaunchTable,
    slot: int,
    dtype: torch.dtype,
    phi: Tensor,
    sources: Tensor,
    factors: Tensor,
) -> Tensor:
    """Writes φ* − Σ steps[k] δ_k into a slot of every target, with B times the scaling, on the current stream.

    All tensors are on the device:
    - phi: float32 (num_values,);
    - sources: int64 (k, ROW_FIELDS), the rows of ``StoredGradient`` with device addresses;
    - factors: float32 (k + 1,), the steps and then the scaling.

    The last two must lie at addresses divisible by 16, because Triton compiles for that. Returns int32 (1,) on the
    device: the number of values that are not finite in ``dtype``.
    """
    infinite = torch.zeros(1, dtype=torch.int32, device=phi.device)
    if table.num_tiles:
        _compose[(table.num_tiles,)](
            table.targets, table.tiles, slot, phi, sources, factors, len(sources), infinite,
            DTYPE=TYPES[dtype], INT8_KIND=INT8, BF16_KIND=BF16, FACTORS_KIND=FACTORS, CODES_PER_SCALE=INT8_BLOCK,
            LONG_PER_SCALE=LONG_BLOCK, FIELDS=_FIELDS, ROW=ROW_FIELDS, ENTRY=TABLE_FIELDS, BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
    return infinite


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernel can write slots of this type."""
    return dtype in TYPES


# By default Triton compiles again for integers that are 1 or divisible by 16. The option prevents this, so that one
# compilation at the warm-up serves all slots and numbers of gradients.
@triton.jit(do_not_specialize=["slot", "num_sources"])
def _compose(  # type: ignore[no-untyped-def]  # noqa: ANN202  # addresses, but for the constants
    targets, tiles, slot, phi, sources, factors, num_sources, infinite,  # noqa: ANN001
    DTYPE: tl.constexpr, INT8_KIND: tl.constexpr, BF16_KIND: tl.constexpr, FACTORS_KIND: tl.constexpr,
    CODES_PER_SCALE: tl.constexpr, LONG_PER_SCALE: tl.constexpr, FIELDS: tl.constexpr, ROW: tl.constexpr,
    ENTRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    target = targets + tl.load(tiles + 2 * tile) * FIELDS
    first, stride, size, columns = (
        tl.load(target), tl.load(target + 1), tl.load(target + 2), tl.load(target + 3)
    )  # fmt: skip
    index = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK)
    mask = index < size
    row, column = index // columns, index % columns
    source = first + row * stride + column
    value = tl.load(phi + source, mask=mask, other=0.0)
    for k in range(num_sources):
        step = tl.load(factors + k)
        kind = tl.load(sources + ROW * k)
        address = tl.load(sources + ROW * k + 1)
        if kind == INT8_KIND:
            codes = tl.load(address.to(tl.pointer_type(tl.int8)) + source, mask=mask, other=0).to(tl.float32)
            scales = tl.load(sources + ROW * k + 2).to(tl.pointer_type(tl.float32))
            value -= step * (codes * tl.load(scales + source // CODES_PER_SCALE, mask=mask, other=0.0))
        elif kind == BF16_KIND:
            halves = tl.load(address.to(tl.pointer_type(tl.uint16)) + source, mask=mask, other=0)
            value -= step * (halves.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        elif kind == FACTORS_KIND:
            scales = tl.load(sources + ROW * k + 2).to(tl.pointer_type(tl.float32))
            shorts = tl.load(sources + ROW * k + 3).to(tl.pointer_type(tl.float32))
            entry = tl.load(sources + ROW * k + 4).to(tl.pointer_type(tl.int64)) + tl.load(target + 8) * ENTRY
            place = source - tl.load(entry)
            i, j = place // tl.load(entry + 1), place % tl.load(entry + 1)
            if tl.load(entry + 3) == 0:  # the long side is the rows
                i, j = j, i
            length, width = tl.load(entry + 7), tl.load(entry + 8)
            blocks = (length + LONG_PER_SCALE - 1) // LONG_PER_SCALE
            codes = address.to(tl.pointer_type(tl.int8)) + tl.load(entry + 4)
            scales += tl.load(entry + 5)
            shorts += tl.load(entry + 6)
            delta = (source * 0).to(tl.float32)
            for c in range(tl.load(entry + 2)):
                code = tl.load(codes + c * length + j, mask=mask, other=0).to(tl.float32)
                scale = tl.load(scales + c * blocks + j // LONG_PER_SCALE, mask=mask, other=0.0)
                delta += tl.load(shorts + c * width + i, mask=mask, other=0.0) * (code * scale)
            value -= step * delta
        else:
            value -= step * tl.load(address.to(tl.pointer_type(tl.float32)) + source, mask=mask, other=0.0)
    if tl.load(target + 7) != 0:
        value *= tl.load(factors + num_sources)
    if tl.bfloat16 == DTYPE:  # rounded by its bits, because Triton's interpreter would truncate
        bits = value.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # a NaN's bits may overflow
    stored = value.to(DTYPE)
    is_finite = tl.abs(stored.to(tl.float32)) < float("inf")  # false for NaN too
    tl.atomic_add(infinite + index * 0, 1, mask=mask & (is_finite == 0))
    place = tl.load(target + 4).to(tl.pointer_type(DTYPE)) + slot * tl.load(target + 5)
    tl.store(place + row * tl.load(target + 6) + column, stored, mask=mask)
