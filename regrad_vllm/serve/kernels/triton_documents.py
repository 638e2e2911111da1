"""Two Triton kernels: φ* for all ReGrad rows of a batch, and each row's documents, read where they lie.

``shrink`` computes h = A* x + Σ c P (Q x). It is split along the inputs, so that a few rows keep the device busy too.
``expand`` sums the splits in a fixed order and adds B* h + s Σ c U (V h) to the base layer's output. The scaling s is
in B* already. Sums are float32, and y is rounded once. There are no atomic operations, so an equal batch gives equal
bits.

A program computes a tile of rows. There are three kinds of tiles:

- One row. Products are those of a matrix and a vector. A load fetches many components of the row's documents at once.
- Decode: 16 successive rows, each with documents of its own. A load fetches one component of each row's document at
  once, every row from its own address. So a row costs the bytes of its documents, and no row waits for another.
  φ* is one product for the whole tile.
- Prefill (``TILED``): rows of one request from the table of tiles. Documents are products on tensor cores.

A **document** in the table has 16 bytes: the payload's address (int64), its coefficient c (float32), its form (int32).
A **slice** has SLICE_FIELDS int64 in the table of slices, see ``device_layers``.
A **form** has FORM_FIELDS int64 for each tensor, see ``device_tables``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regrad_vllm.serve.kernels.triton_factors import (
    BLOCK,
    COMPONENTS,
    codes_at,
    codes_product,
    document_at,
    dot,
    lanes_of,
    most_components,
    product,
    scales_at,
    shorts_at,
    tensor_of,
)

SLICE_FIELDS = 8
_SLICE = tl.constexpr(SLICE_FIELDS)
UNROLLED = tl.constexpr(4)  # components of a document in decode


@triton.jit
def _rows(tile, tiles, rows, num_rows, ROWS: tl.constexpr, TILED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """(row, its first document, its number of documents) of each row in a tile; number −1: it isn't ReGrad's."""
    index = tl.arange(0, ROWS)
    if TILED:
        row = tl.load(tiles + 2 * tile) + index
        here = (index < tl.load(tiles + 2 * tile + 1)) & (row < num_rows)
    else:
        row = tile * ROWS + index
        here = row < num_rows
    first = tl.load(rows + 2 * row, mask=here, other=0)
    count = tl.load(rows + 2 * row + 1, mask=here, other=-1)
    return row, first, count


@triton.jit
def _number(slices, part, place: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    number = tl.load(slices + _SLICE * part + place).to(tl.int32)
    return tl.multiple_of(number, 16) if ALIGNED else number


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["num_rows", "share"])
def shrink(  # type: ignore[no-untyped-def]  # noqa: ANN201  # addresses, but for the numbers and constants
    x, low, slices, forms, rows, documents, tiles, num_rows, inputs, x_stride, share,  # noqa: ANN001
    DTYPE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, RANK_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TILED: tl.constexpr, TENSORS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """low (splits, slices, rows, RANK_BLOCKS · BLOCK_RANK) float32: each split's part of h."""
    split, part, rank_block = tl.program_id(1), tl.program_id(2) // RANK_BLOCKS, tl.program_id(2) % RANK_BLOCKS
    place_a = tl.load(slices + _SLICE * part)
    row, first, count = _rows(tl.program_id(0), tiles, rows, num_rows, ROWS, TILED)
    most = tl.max(count, 0)
    if (most >= 0) & (place_a != 0):
        here = count >= 0
        tensor = tl.load(slices + _SLICE * part + 2)
        begin = _number(slices, part, 4, ALIGNED)
        most = tl.where(tensor < 0, 0, most)
        rank = rank_block * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        a = _pointer(place_a, DTYPE, ALIGNED)
        x_rows = x + row.to(tl.int64) * x_stride
        total = tl.zeros((ROWS, BLOCK_RANK), tl.float32)
        more = tl.zeros((ROWS, BLOCK_RANK), tl.float32)
        # Blocks lie on the whole tensor's grid of 128, also where this worker has only some of its columns.
        base = begin // BLOCK * BLOCK
        end = tl.minimum(begin + inputs, base + (split + 1) * share * BLOCK)
        for start in range(base + split * share * BLOCK, end, BLOCK):
            index = start + tl.arange(0, BLOCK)
            column = index - begin
            if EVEN:
                inside = tl.full((BLOCK,), 1, tl.int1)
                values = tl.load(x_rows[:, None] + column[None, :], mask=here[:, None], other=0.0)
                factors = tl.load(a + rank[None, :] * inputs + column[:, None])
            else:
                inside = (column >= 0) & (index < end)
                values = tl.load(x_rows[:, None] + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
                factors = tl.load(a + rank[None, :] * inputs + column[:, None], mask=inside[:, None], other=0.0)
            if (ROWS >= 16) & (not EXACT) & (values.dtype == factors.dtype):
                total = dot(values, factors, total)
            else:
                total += product(values.to(tl.float32), factors, ROWS, EXACT)
            if TILED or ROWS == 1:  # all rows have the same documents
                for c in range(0, most * most_components(forms, tensor), COMPONENTS):
                    component, has, coefficient, blocks, scales, shorts, codes, stride, bits = lanes_of(
                        forms, documents, tl.max(first, 0), most, c, tensor, TENSORS
                    )
                    code = codes_at(codes + component * stride, bits, index, has[:, None] & inside[None, :], ALIGNED)
                    scale = scales_at(scales, blocks, component, start // BLOCK, has, BLOCK) * coefficient[:, None]
                    weight = codes_product(values, code, ROWS, EXACT) * tl.trans(scale)
                    more += product(weight, shorts_at(shorts, component, rank, has, RANK), ROWS, EXACT)
            else:
                for j in range(most):
                    address, coefficient, form = document_at(documents, first + j, j < count)
                    components, blocks, scales, shorts, codes, stride, bits = tensor_of(
                        forms, form, address, tensor, j < count, TENSORS
                    )
                    for c in range(tl.max(components, 0)):
                        has = c < components
                        code = codes_at(codes + c * stride, bits, index, has[:, None] & inside[None, :], ALIGNED)
                        weight = tl.sum(values.to(tl.float32) * code.to(tl.float32), 1)
                        weight *= tl.sum(scales_at(scales, blocks, c, start // BLOCK, has, BLOCK), 1) * coefficient
                        more += weight[:, None] * shorts_at(shorts, c, rank, has, RANK).to(tl.float32)
        place = (split * (tl.num_programs(2) // RANK_BLOCKS) + part) * num_rows + row
        tl.store(
            low + place.to(tl.int64)[:, None] * (RANK_BLOCKS * BLOCK_RANK) + rank[None, :], total + more,
            mask=here[:, None],
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "splits"])
def expand(  # type: ignore[no-untyped-def]  # noqa: ANN201  # addresses, but for the numbers and constants
    y, low, slices, forms, rows, documents, tiles, num_rows, y_stride, splits, scaling,  # noqa: ANN001
    DTYPE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, RANK_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TILED: tl.constexpr, TENSORS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Adds to WIDTH outputs of one slice, for a tile of rows."""
    FULL: tl.constexpr = RANK_BLOCKS * BLOCK_RANK
    part = tl.program_id(2)
    place_b = tl.load(slices + _SLICE * part + 1)
    begin = _number(slices, part, 5, ALIGNED)
    outputs = _number(slices, part, 6, ALIGNED)
    start = begin // BLOCK * BLOCK + tl.program_id(1) * WIDTH
    row, first, count = _rows(tl.program_id(0), tiles, rows, num_rows, ROWS, TILED)
    most = tl.max(count, 0)
    if (most >= 0) & (place_b != 0) & (start < begin + outputs):
        here = count >= 0
        tensor = tl.load(slices + _SLICE * part + 3)
        most = tl.where(tensor < 0, 0, most)
        index = start + tl.arange(0, WIDTH)
        column = index - begin
        inside = tl.full((WIDTH,), 1, tl.int1) if EVEN else (column >= 0) & (column < outputs)
        b = _pointer(place_b, DTYPE, ALIGNED)
        h = _summed(low, part, row, here, num_rows, splits, tl.arange(0, FULL), FULL, SPLITS, SOME)
        if RANK_BLOCKS == 1:
            total = product(h, _factors(b, outputs, tl.arange(0, FULL), column, inside, EVEN), ROWS, EXACT)
        else:  # a program can't hold all of a high rank's factors
            total = tl.zeros((ROWS, WIDTH), tl.float32)
            for k in range(RANK_BLOCKS):
                rank = k * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
                some = _summed(low, part, row, here, num_rows, splits, rank, FULL, SPLITS, SOME)
                total += product(some, _factors(b, outputs, rank, column, inside, EVEN), ROWS, EXACT)
        more = tl.zeros((ROWS, WIDTH), tl.float32)
        if TILED or ROWS == 1:  # all rows have the same documents
            for c in range(0, most * most_components(forms, tensor), COMPONENTS):
                component, has, coefficient, blocks, scales, shorts, codes, stride, bits = lanes_of(
                    forms, documents, tl.max(first, 0), most, c, tensor, TENSORS
                )
                code = codes_at(codes + component * stride, bits, index, has[:, None] & inside[None, :], ALIGNED)
                short = shorts_at(shorts, component, tl.arange(0, FULL), has, RANK)
                scale = (
                    scales_at(scales, blocks, component, start // BLOCK, has, BLOCK) * (coefficient * scaling)[:, None]
                )
                weight = product(h, tl.trans(short), ROWS, EXACT) * tl.trans(scale)
                more += product(weight, code.to(tl.float32).to(tl.bfloat16), ROWS, EXACT)
        else:
            for j in range(most):
                address, coefficient, form = document_at(documents, first + j, j < count)
                components, blocks, scales, shorts, codes, stride, bits = tensor_of(
                    forms, form, address, tensor, j < count, TENSORS
                )
                for some in range(0, tl.max(components, 0), UNROLLED):
                    for k in tl.static_range(UNROLLED):  # their loads don't wait for each other
                        has = some + k < components
                        code = codes_at(
                            codes + (some + k) * stride, bits, index, has[:, None] & inside[None, :], ALIGNED
                        )
                        short = shorts_at(shorts, some + k, tl.arange(0, FULL), has, RANK)
                        scale = scales_at(scales, blocks, some + k, start // BLOCK, has, WIDTH)
                        weight = tl.sum(h * short.to(tl.float32), 1) * coefficient * scaling
                        more += (weight[:, None] * scale) * code.to(tl.float32)
        place = y + row.to(tl.int64)[:, None] * y_stride + _number(slices, part, 7, ALIGNED) + column[None, :]
        mask = here[:, None] & inside[None, :]
        before = tl.load(place, mask=mask, other=0.0)
        tl.store(place, (before.to(tl.float32) + (total + more)).to(before.dtype), mask=mask)


@triton.jit
def _summed(low, part, row, here, num_rows, splits, rank, FULL: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """h (rows, ranks): the sum of its splits, SOME of SPLITS at once."""
    total = tl.sum(_splits(low, part, row, here, num_rows, splits, rank, 0, FULL, SOME), 0)
    for first in tl.static_range(SOME, SPLITS, SOME):
        total += tl.sum(_splits(low, part, row, here, num_rows, splits, rank, first, FULL, SOME), 0)
    return total


@triton.jit
def _splits(low, part, row, here, num_rows, splits, rank, first, FULL: tl.constexpr, SOME: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """(SOME, rows, ranks) of h's splits, from the first on; zeros beyond the last."""
    split = first + tl.arange(0, SOME)
    place = ((split * tl.num_programs(2) + part) * num_rows)[:, None] + row[None, :]
    there = (split < splits)[:, None] & here[None, :]
    return tl.load(low + place.to(tl.int64)[:, :, None] * FULL + rank[None, None, :], mask=there[:, :, None], other=0.0)


@triton.jit
def _factors(b, outputs, rank, column, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """φ*'s B for some ranks and columns, (ranks, columns)."""
    pointers = b + rank[:, None] * outputs + column[None, :]
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside[None, :], other=0.0)
