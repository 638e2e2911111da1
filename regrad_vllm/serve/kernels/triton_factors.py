"""The parts of both Triton kernels: products in the precision of their types, and the factors of documents.

Codes are whole numbers up to 127, which bfloat16 holds exactly. A factor in float32 enters a product as the sum of two
bfloat16, so that a product loses less than the rounding of y does.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # codes for one scale, as in ``bank_service.wire.codecs.factors``
COMPONENTS = tl.constexpr(16)  # components of one product in prefill, the fewest of a tensor core
FORM_FIELDS = 8
_FORM = tl.constexpr(FORM_FIELDS)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(left, right, total):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """total + left times right, on tensor cores, in two-byte types."""
    if _INTERPRETED:  # its product takes the bits of bfloat16 for whole numbers
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def product(left, right, ROWS: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """left (ROWS, K) float32 times right (K, N)."""
    if ROWS < 16:  # too few for a tensor core
        total = tl.sum(left[:, :, None] * right.to(tl.float32)[None, :, :], 1)
    elif EXACT:
        total = tl.dot(left, right.to(tl.float32), input_precision="ieee")
    elif right.dtype == tl.bfloat16:
        high = (left.to(tl.uint32, bitcast=True) >> 16 << 16).to(tl.float32, bitcast=True)
        total = dot((left - high).to(tl.bfloat16), right, tl.zeros((ROWS, right.shape[1]), tl.float32))
        total = dot(high.to(tl.bfloat16), right, total)
    else:
        total = tl.dot(left, right.to(tl.float32), input_precision="tf32")
    return total


@triton.jit
def codes_product(values, code, ROWS: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """values (ROWS, BLOCK) times the codes (COMPONENTS, BLOCK), transposed; exact but for the sum."""
    if ROWS < 16:
        total = tl.sum(values.to(tl.float32)[:, None, :] * code.to(tl.float32)[None, :, :], 2)
    elif EXACT:
        total = tl.dot(values.to(tl.float32), tl.trans(code.to(tl.float32)), input_precision="ieee")
    else:
        zero = tl.zeros((ROWS, COMPONENTS), tl.float32)
        total = dot(values, tl.trans(code.to(tl.float32).to(values.dtype)), zero)
    return total


@triton.jit
def document_at(documents, place, here):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """(address, coefficient, form) of documents; zeros where there is none."""
    address = tl.load(documents.to(tl.pointer_type(tl.int64)) + 2 * place, mask=here, other=0)
    coefficient = tl.load(documents.to(tl.pointer_type(tl.float32)) + 4 * place + 2, mask=here, other=0.0)
    form = tl.load(documents.to(tl.pointer_type(tl.int32)) + 4 * place + 3, mask=here, other=0)
    return address, coefficient, form


@triton.jit
def tensor_of(forms, form, address, tensor, here, TENSORS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """(components, scale blocks, addresses of scales, shorts and codes, stride, bits) of documents in one tensor."""
    entry = forms + ((form.to(tl.int64) + 1) * TENSORS + tensor) * _FORM
    count = tl.load(entry, mask=here, other=0).to(tl.int32)
    blocks = (tl.load(entry + 1, mask=here, other=0) + BLOCK - 1) // BLOCK
    scales = address + tl.load(entry + 3, mask=here, other=0)
    shorts = address + tl.load(entry + 4, mask=here, other=0)
    codes = address + tl.load(entry + 5, mask=here, other=0)
    stride = tl.load(entry + 6, mask=here, other=0)
    bits = tl.load(entry + 7, mask=here, other=8)
    return count, blocks, scales, shorts, codes, stride, bits


@triton.jit
def most_components(forms, tensor):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The most components that a document of any form has in a tensor."""
    return tl.load(forms + tensor * _FORM).to(tl.int32)


@triton.jit
def lanes_of(forms, documents, first, number, start, tensor, TENSORS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """COMPONENTS components of ``number`` successive documents, from component ``start`` of all of them.

    Returns (component, whether there is one, coefficient) and what ``tensor_of`` returns but for the number of
    components.
    """
    each = tl.maximum(most_components(forms, tensor), 1)
    lane = start + tl.arange(0, COMPONENTS)
    here = lane // each < number
    address, coefficient, form = document_at(documents, first + lane // each, here)
    count, blocks, scales, shorts, codes, stride, bits = tensor_of(forms, form, address, tensor, here, TENSORS)
    return lane % each, here & (lane % each < count), coefficient, blocks, scales, shorts, codes, stride, bits


@triton.jit
def codes_at(address, bits, index, mask, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The codes ``index`` (BLOCKS,) of components at ``address`` (N,), as int32 (N, BLOCKS)."""
    # A block of 128 codes of 4 bits has 64 bytes. Byte i has code i in its low half and code i + 64 in its high half.
    packed = (bits == 4)[:, None]
    place = tl.where(packed, (index // BLOCK * (BLOCK // 2) + index % (BLOCK // 2))[None, :], index[None, :])
    pointer = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    byte = tl.load(pointer[:, None] + place, mask=mask, other=0).to(tl.int32)
    shift = (index % BLOCK // (BLOCK // 2) * 4)[None, :]
    return tl.where(packed, ((byte >> shift) & 15) - 8, byte)


@triton.jit
def scales_at(address, blocks, component, block, here, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The scales of WIDTH codes of one component each, float32 (N, WIDTH), or (N, 1) for one block of codes."""
    start = address.to(tl.pointer_type(tl.bfloat16)) + component * blocks
    scale = tl.load(start + block, mask=here, other=0.0).to(tl.float32)[:, None]
    for k in tl.static_range(1, WIDTH // BLOCK):
        more = tl.load(start + block + k, mask=here & (block + k < blocks), other=0.0).to(tl.float32)[:, None]
        scale = tl.where((tl.arange(0, WIDTH) // BLOCK == k)[None, :], more, scale)
    return scale


@triton.jit
def shorts_at(address, component, rank, here, RANK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The short vectors of one component each, bfloat16 (N, ranks); zeros beyond the rank."""
    start = address.to(tl.pointer_type(tl.bfloat16)) + component * RANK
    return tl.load(start[:, None] + rank[None, :], mask=here[:, None] & (rank < RANK)[None, :], other=0.0)
