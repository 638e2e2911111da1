"""Vector instructions of the loops, written as LLVM's own, so that they don't hang on what a compiler finds.

A vector has 16 floats: two registers of AVX2 or one of AVX-512. Addresses are int64, strides are in bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_AHEAD = 512  # bytes from a code to the one prefetched: the same component's in the next columns of ``row_loops``
TILE_ROWS = 6  # with 16 columns they fill 12 of AVX2's 16 registers
_FLOAT, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_CONTRACT = ("contract",)  # a product and a sum may become one instruction


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


def _vector(builder: Any, address: Any, element: Any, lanes: int = LANES) -> Any:
    kind = ir.VectorType(element, lanes)
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1 if element == _I8 else 2)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _scalar(builder: Any, address: Any, element: Any = _FLOAT) -> Any:
    return builder.load(builder.inttoptr(address, element.as_pointer()))


def _splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    )


def _zeros(lanes: int = LANES) -> Any:
    return ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)


def _multiply_add(builder: Any, one: Any, other: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other, flags=_CONTRACT), flags=_CONTRACT)


def _variable(builder: Any, value: Any) -> Any:
    """A variable that changes in a loop. LLVM keeps it in a register."""
    place = cgutils.alloca_once(builder, value.type)
    builder.store(value, place)
    return place


def _sum(builder: Any, vector: Any) -> Any:
    """The sum of a vector's floats."""
    kind = ir.FunctionType(_FLOAT, [_FLOAT, vector.type])
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("reassoc",))


def _from_bf16(builder: Any, values: Any) -> Any:
    """Stored bfloat16, a number or a vector → float32."""
    wide, floats, shift = _I32, _FLOAT, ir.Constant(_I32, 16)
    if isinstance(values.type, ir.VectorType):
        lanes = values.type.count
        wide, floats = ir.VectorType(_I32, lanes), ir.VectorType(_FLOAT, lanes)
        shift = ir.Constant(wide, [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(values, wide), shift), floats)


def _bf16s(builder: Any, address: Any) -> Any:
    """The next bfloat16 values → float32."""
    return _from_bf16(builder, _vector(builder, address, _I16))


def _codes8(builder: Any, address: Any, lanes: int = LANES) -> Any:
    """The next int8 codes → float32."""
    codes = builder.sext(_vector(builder, address, _I8, lanes), ir.VectorType(_I32, lanes))
    return builder.sitofp(codes, ir.VectorType(_FLOAT, lanes))


def _codes4(builder: Any, address: Any) -> tuple[Any, Any]:
    """The next 16 bytes of 4-bit codes → float32 of the low halves, and of the high halves."""
    kind = ir.VectorType(_I8, LANES)
    pairs = _vector(builder, address, _I8)
    fifteen, four, eight = (ir.Constant(kind, [value] * LANES) for value in (15, 4, 8))
    halves = [
        builder.sitofp(builder.sext(builder.sub(half, eight), ir.VectorType(_I32, LANES)), ir.VectorType(_FLOAT, LANES))
        for half in (builder.and_(pairs, fifteen), builder.lshr(pairs, four))
    ]
    return halves[0], halves[1]


def _at(builder: Any, address: Any, index: Any, step: int) -> Any:
    return builder.add(address, builder.mul(index, _number(step)))


def _loop(builder: Any, count: Any) -> Any:
    return cgutils.for_range(builder, count)


@intrinsic
def tile(
    typingctx: Any, num_rows: Any, x: Any, x_stride: Any, w: Any, depth: Any, panels: Any, start: Any, out: Any,
    stride: Any, panel_stride: Any,
) -> Any:  # fmt: skip
    """out[row, panel] = start[row, panel] + Σ_k x[row, k] w[panel, k], for at most ``TILE_ROWS`` rows.

    Zeros if start is 0. w: (panels, depth, 16) floats. Rows and panels of ``start`` and ``out`` are ``stride`` and
    ``panel_stride`` apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for number in range(1, TILE_ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", args[0], _number(number))):
                _multiply(builder, number, *args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def _multiply(
    builder: Any, num_rows: int, x: Any, x_stride: Any, w: Any, depth: Any, panels: Any, start: Any, out: Any,
    stride: Any, panel_stride: Any,
) -> None:  # fmt: skip
    rows = [_number(row) for row in range(num_rows)]
    sources = [builder.add(x, builder.mul(row, x_stride)) for row in rows]
    sums = [_variable(builder, _zeros()) for _ in rows]
    with _loop(builder, panels) as panel:
        own_w = builder.add(w, builder.mul(panel.index, builder.mul(depth, _number(4 * LANES))))
        offset = builder.mul(panel.index, panel_stride)
        offsets = [builder.add(offset, builder.mul(row, stride)) for row in rows]
        for place in sums:
            builder.store(_zeros(), place)
        with builder.if_then(builder.icmp_signed("!=", start, _number(0))):
            for offset, place in zip(offsets, sums, strict=True):
                builder.store(_vector(builder, builder.add(start, offset), _FLOAT), place)
        with _loop(builder, depth) as loop:
            column = _vector(builder, _at(builder, own_w, loop.index, 4 * LANES), _FLOAT)
            for source, place in zip(sources, sums, strict=True):
                value = _splat(builder, _scalar(builder, _at(builder, source, loop.index, 4)))
                builder.store(_multiply_add(builder, value, column, builder.load(place)), place)
        for offset, place in zip(offsets, sums, strict=True):
            _store(builder, builder.load(place), builder.add(out, offset))


@intrinsic
def scaled_coefficients(typingctx: Any, factors: Any, coefficients: Any, scales: Any, stride: Any, count: Any) -> Any:
    """factors[c] = coefficients[c] scales[c], of ``count`` components. The scales are bfloat16, ``stride`` apart."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        factors, coefficients, scales, stride, count = args
        with _loop(builder, count) as loop:
            scale = _scalar(builder, builder.add(scales, builder.mul(loop.index, stride)), _I16)
            coefficient = _scalar(builder, _at(builder, coefficients, loop.index, 4))
            _store(builder, builder.fmul(coefficient, _from_bf16(builder, scale)), _at(builder, factors, loop.index, 4))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _prefetch(builder: Any, address: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), *[_I32] * 3])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, _I8.as_pointer()), read, keep, data])


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Prefetches the cache line at an address. Any address is allowed, even an invalid one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@cache
def spread8(lanes: int) -> Any:
    """The loop over int8 codes, some of them at a time."""

    @intrinsic
    def spread(typingctx: Any, part: Any, codes: Any, stride: Any, factors: Any, count: Any) -> Any:
        """part[0:lanes] += Σ_c factors[c] codes[c, 0:lanes], over ``count`` components."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            part, codes, stride, factors, count = args
            place = _variable(builder, _vector(builder, part, _FLOAT, lanes))
            with _loop(builder, count) as loop:
                factor = _splat(builder, _scalar(builder, _at(builder, factors, loop.index, 4)), lanes)
                own = builder.add(codes, builder.mul(loop.index, stride))
                _prefetch(builder, builder.add(own, _number(_AHEAD)))
                values = _codes8(builder, own, lanes)
                builder.store(_multiply_add(builder, factor, values, builder.load(place)), place)
            _store(builder, builder.load(place), part)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return spread


@intrinsic
def spread4(typingctx: Any, part: Any, codes: Any, stride: Any, factors: Any, count: Any) -> Any:
    """part[0:128] += Σ_c factors[c] codes[c, 0:128], over ``count`` components, for one block of 4-bit codes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        part, codes, stride, factors, count = args
        for first in range(0, 64, LANES):
            parts = [builder.add(part, _number(4 * column)) for column in (first, first + 64)]
            sums = [_variable(builder, _vector(builder, own, _FLOAT)) for own in parts]
            with _loop(builder, count) as loop:
                factor = _splat(builder, _scalar(builder, _at(builder, factors, loop.index, 4)))
                place = builder.add(builder.add(codes, builder.mul(loop.index, stride)), _number(first))
                for values, total in zip(_codes4(builder, place), sums, strict=True):
                    builder.store(_multiply_add(builder, factor, values, builder.load(total)), total)
            for total, own in zip(sums, parts, strict=True):
                _store(builder, builder.load(total), own)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _dot(load: Any, value_bytes: int) -> Any:
    """Σ_i values[i] x[i] over whole vectors, float32. ``load``: (builder, address) → the next values as float32."""

    @intrinsic
    def dot(typingctx: Any, x: Any, values: Any, num_vectors: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, values, num_vectors = args
            total = _variable(builder, _zeros())
            with _loop(builder, num_vectors) as loop:
                some = load(builder, _at(builder, values, loop.index, value_bytes * LANES))
                own = _vector(builder, _at(builder, x, loop.index, 4 * LANES), _FLOAT)
                builder.store(_multiply_add(builder, some, own, builder.load(total)), total)
            return _sum(builder, builder.load(total))

        return types.float32(*[types.int64] * 3), generate

    return dot


gather8 = _dot(_codes8, 1)  # of int8 codes
dot_bf16 = _dot(_bf16s, 2)  # of shorts


@cache
def gather_blocks(bits: int) -> Any:
    """The loop over whole blocks of 128 codes."""

    @intrinsic
    def gather(typingctx: Any, x: Any, codes: Any, scales: Any, num_blocks: Any) -> Any:
        """Σ_b scales[b] Σ_i codes[b, i] x[b, i], float32. The scales are bfloat16."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, codes, scales, num_blocks = args
            total = _variable(builder, _zeros())
            with _loop(builder, num_blocks) as loop:
                own_x = _at(builder, x, loop.index, 4 * 128)
                own_codes = _at(builder, codes, loop.index, 16 * bits)
                sums = [_zeros(), _zeros()]
                for first in range(0, 64, LANES):
                    if bits == 4:
                        both = _codes4(builder, builder.add(own_codes, _number(first)))
                    else:
                        both = tuple(
                            _codes8(builder, builder.add(own_codes, _number(place))) for place in (first, first + 64)
                        )
                    for half, values in enumerate(both):
                        place = builder.add(own_x, _number(4 * (first + 64 * half)))
                        sums[half] = _multiply_add(builder, values, _vector(builder, place, _FLOAT), sums[half])
                scale = _splat(
                    builder, _from_bf16(builder, _scalar(builder, _at(builder, scales, loop.index, 2), _I16))
                )
                block = builder.fadd(*sums)
                builder.store(_multiply_add(builder, scale, block, builder.load(total)), total)
            return _sum(builder, builder.load(total))

        return types.float32(*[types.int64] * 4), generate

    return gather


@intrinsic
def add_bf16(typingctx: Any, out: Any, shorts: Any, num_vectors: Any, factor: Any) -> Any:
    """out[j] += factor · shorts[j] over whole vectors. The shorts are bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, shorts, num_vectors, factor = args
        factors = _splat(builder, factor)
        with _loop(builder, num_vectors) as loop:
            values = _bf16s(builder, _at(builder, shorts, loop.index, 2 * LANES))
            place = _at(builder, out, loop.index, 4 * LANES)
            _store(builder, _multiply_add(builder, factors, values, _vector(builder, place, _FLOAT)), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float32), generate
