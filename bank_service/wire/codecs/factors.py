"""Factors: a few components of every tensor, their number fixed, so that all documents of a learner have one size.

Codec ``factors-P-Q-BITS`` keeps P components of each ΔB and Q of each ΔA, at most as many as the tensor's smaller side.
A **component** is a long vector times a short vector. A's long side is its columns, B's is its rows. The short side is
the rank. Long vectors are stored as codes of 8 or 4 bits. ``factors_fit`` chooses the components.

Payload, little-endian, tensors in layout order: A, B, A, B and so on. The part of each tensor starts at a multiple of
16 bytes and holds, one after another:
    scales  bf16 (count, ceil(long / 128)), one for each 128 codes of a component
    shorts  bf16 (count, short)
    zeros up to a multiple of 16
    codes   (count, stride) bytes. 8 bits: one int8 in −127..127 each, stride long.
            4 bits: blocks of 128 codes in 64 bytes. Byte i of a block holds code i in its low half and code i + 64
            in its high half, each as code + 8. Code 0 pads the last block. The stride is 64 · ceil(long / 128).
    zeros up to a multiple of 16
Value (long i, short j) of a tensor is Σ_c scale[c, i // 128] · code[c, i] · short[c, j], in float32. The component with
the most energy comes first. A worker reads payloads where they lie, so there is nothing to unpack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bank_service.wire.codecs.base import FloatArray, GradientFormatError, GradientSpec, check_length, slices
from bank_service.wire.codecs.bf16 import from_bf16
from bank_service.wire.codecs.factors_fit import BLOCK, Components, fitted

__all__ = [
    "BLOCK", "CODES", "COUNT", "LONG", "SCALES", "SHORT", "SHORTS", "STRIDE", "FactorForm", "FactorsCodec",
    "factor_form", "is_factors",
]  # fmt: skip

COUNT, LONG, SHORT, SCALES, SHORTS, CODES, STRIDE = range(7)  # the columns of a form's table

Shapes = tuple[tuple[int, int], ...]
Int64Array = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

CHOICE = "factors-P-Q-BITS with P in 1..99, Q in 0..99 and BITS 8 or 4"
_NAME = re.compile(r"factors-([1-9][0-9]?)-(0|[1-9][0-9]?)-(8|4)")
_ALIGNMENT = 16
_LARGEST_VALUE = 2.0**50  # of a gradient; then scales and shorts stay below the limit of ``_HIGH_BYTE``
_CHUNK_VALUES = 2**18  # values fitted at once

# Rules for the bytes of a payload. A byte b of a kind is sound if ((b & mask) + offset) mod 256 ≤ limit, in both tests.
_HIGH_BYTE = 0x5A  # of a bf16 below 2**55; then a sum of 99 products scale · 127 · short is finite in float32
_ZERO, _LOW, _SCALE, _SHORT, _CODE, _PAIR, _LAST_PAIR, _NO_PAIR = range(8)
_RULES = (
    "zero, because it is padding",
    "anything",
    f"at most {_HIGH_BYTE:#x} without a sign, because a scale is below 2**55",
    f"at most {_HIGH_BYTE:#x} but for the sign, because a short value is below 2**55",
    "a code in -127..127",
    "two codes in -7..7",
    "a code in -7..7 and the code 0, because it pads a block",
    "two codes 0, because it pads a block",
)
_TESTS = tuple(  # mask, offset and limit of each kind
    tuple(np.array(column, np.uint8) for column in zip(*rows, strict=True))
    for rows in (
        ((255, 0, 0), (0, 0, 0), (255, 0, _HIGH_BYTE), (127, 0, _HIGH_BYTE), (255, 127, 254), (240, 240, 224),
         (240, 128, 0), (240, 128, 0)),
        ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (15, 255, 14), (15, 255, 14), (15, 248, 0)),
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class FactorForm:
    """The places of all parts of a payload. They depend on the codec and the layout alone.

    ``table``, int64 (tensors, 7), has these columns:

    - COUNT, LONG, SHORT: the number of components, and the lengths of both sides
    - SCALES, SHORTS, CODES: where these begin, in bytes from the start of the payload
    - STRIDE: the bytes from one component's codes to the next component's
    """

    table: Int64Array
    payload_bytes: int
    bits: int


def is_factors(codec: str) -> bool:
    return _NAME.fullmatch(codec) is not None


def factor_form(codec: str, shapes: Shapes) -> FactorForm:
    """The form of the payloads of a codec. GradientFormatError for a codec that is no ``factors-P-Q-BITS``.

    ``shapes``: of the tensors in layout order. Those with an even index are A (rank, in), the others B (out, rank).
    Codecs whose P and Q exceed the rank have one form, the same object.
    """
    if not is_factors(codec):
        raise GradientFormatError(f"codec must be {CHOICE}, got {codec!r}")
    of_b, of_a, bits = map(int, codec.split("-")[1:])
    most_of_a, most_of_b = _most(shapes)
    return _form(min(of_b, most_of_b), min(of_a, most_of_a), bits, shapes)


@lru_cache(maxsize=4)
def _most(shapes: Shapes) -> tuple[int, int]:
    """The most components that any A can have, and any B."""
    return max(map(min, shapes[::2])), max(map(min, shapes[1::2]), default=0)


@lru_cache(maxsize=16)
def _form(of_b: int, of_a: int, bits: int, shapes: Shapes) -> FactorForm:
    table = np.zeros((len(shapes), 7), np.int64)
    end = 0
    for index, shape in enumerate(shapes):
        short, long = (shape[1], shape[0]) if index % 2 else shape
        count = min(of_b if index % 2 else of_a, *shape)
        blocks = -(-long // BLOCK)
        shorts = end + 2 * count * blocks
        codes = _aligned(shorts + 2 * count * short)
        stride = long if bits == 8 else blocks * BLOCK // 2
        table[index] = count, long, short, end, shorts, codes, stride
        end = _aligned(codes + count * stride)
    table.setflags(write=False)
    return FactorForm(table, end, bits)


class FactorsCodec:
    """``factors-P-Q-BITS``. Its payloads have one size for each layout."""

    def __init__(self, name: str) -> None:
        """``name`` must satisfy ``is_factors``."""
        self.name = name

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return factor_form(self.name, spec.shapes).payload_bytes

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        if float(np.abs(values).max()) > _LARGEST_VALUE:
            raise GradientFormatError(f"values must be at most 2**50 in {self.name}; the gradient diverged")
        form = factor_form(self.name, spec.shapes)
        payload = np.zeros(form.payload_bytes, np.uint8)
        tensors = _views(values, spec.shapes)
        for indices in _chunks(form, spec.shapes):
            alike = np.stack([tensors[index] for index in indices]).astype(np.float64)
            _write(payload, form, indices, fitted(alike, int(form.table[indices[0], COUNT]), form.bits))
        made = payload.tobytes()
        self.check(memoryview(made), spec)
        return made

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        form = factor_form(self.name, spec.shapes)
        check_length(self.name, payload, form.payload_bytes)
        found = np.frombuffer(payload, np.uint8)
        kinds, guards = _guards(form)
        for part in slices(len(found)):
            for mask, offset, limit in guards:
                wrong = ((found[part] & mask[part]) + offset[part]) > limit[part]
                if bool(wrong.any()):
                    place = part.start + int(wrong.argmax())
                    raise GradientFormatError(
                        f"byte {place} of a {self.name} payload must be {_RULES[kinds[place]]}, got {found[place]:#04x}"
                    )

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        form = factor_form(self.name, spec.shapes)
        found = np.frombuffer(payload, np.uint8)
        for tensor, row in zip(_views(out, spec.shapes), form.table, strict=True):
            tensor[:] = 0
            for long, short in _components(found, row, form.bits):
                tensor += np.multiply.outer(short, long)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT


def _views(values: FloatArray, shapes: Shapes) -> list[FloatArray]:
    """Each tensor (short, long), as a view into ``values``."""
    views, start = [], 0
    for index, (rows, columns) in enumerate(shapes):
        tensor = values[start : start + rows * columns].reshape(rows, columns)
        views.append(tensor.T if index % 2 else tensor)
        start += rows * columns
    return views


@lru_cache(maxsize=4)
def _chunks(form: FactorForm, shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    """The tensors that have components. Those of a chunk have equal shapes and are fitted together."""
    counts = form.table[:, COUNT]
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        if counts[index]:
            alike.setdefault((index % 2, *shape), []).append(index)
    chunks: list[tuple[int, ...]] = []
    for (_, rows, columns), indices in alike.items():
        size = max(1, _CHUNK_VALUES // (rows * columns))
        chunks += [tuple(indices[first : first + size]) for first in range(0, len(indices), size)]
    return tuple(chunks)


def _write(payload: Bytes, form: FactorForm, indices: tuple[int, ...], found: Components) -> None:
    """Puts the components of tensors of equal shape into their places."""
    codes = found.codes.view(np.uint8) if form.bits == 8 else _packed(found.codes)
    for index, scales, shorts, own in zip(indices, found.scales, found.shorts, codes, strict=True):
        row = form.table[index]
        for place, part in (
            (row[SCALES], scales.astype("<u2")),
            (row[SHORTS], shorts.astype("<u2")),
            (row[CODES], own),
        ):
            content = part.reshape(-1).view(np.uint8)
            payload[place : place + len(content)] = content


def _components(payload: Bytes, row: Int64Array, bits: int) -> Iterator[tuple[FloatArray, FloatArray]]:
    """(long, short) of each component of a tensor, float32."""
    count, length, width, first_scale, first_short, first_code, stride = (int(value) for value in row)
    blocks = -(-length // BLOCK)
    scales = from_bf16(payload[first_scale:first_short].view("<u2")).reshape(count, blocks)
    shorts = from_bf16(payload[first_short : first_short + 2 * count * width].view("<u2")).reshape(count, width)
    stored = payload[first_code : first_code + count * stride].reshape(count, stride)
    codes = stored.view(np.int8) if bits == 8 else _unpacked(stored)[:, :length]
    yield from zip(codes * np.repeat(scales, BLOCK, axis=1)[:, :length], shorts, strict=True)


def _packed(codes: npt.NDArray[np.int8]) -> Bytes:
    """(…, length) codes in −7..7 → (…, stride)."""
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % BLOCK)]
    halves = (np.pad(codes, padding) + 8).astype(np.uint8).reshape(*codes.shape[:-1], -1, 2, BLOCK // 2)
    packed: Bytes = halves[..., 0, :] | np.left_shift(halves[..., 1, :], np.uint8(4), dtype=np.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def _unpacked(packed: Bytes) -> npt.NDArray[np.int8]:
    """(count, stride) → (count, whole blocks) codes."""
    blocks = packed.reshape(len(packed), packed.shape[1] // (BLOCK // 2), 1, BLOCK // 2)
    halves = np.concatenate([blocks & 15, blocks >> 4], axis=2)
    codes: npt.NDArray[np.int8] = halves.reshape(len(packed), 2 * packed.shape[1]).astype(np.int8)
    codes -= 8
    return codes


@lru_cache(maxsize=4)  # an entry has 4 or 7 bytes for each byte of a payload
def _guards(form: FactorForm) -> tuple[Bytes, tuple[tuple[Bytes, Bytes, Bytes], ...]]:
    """The kind of each byte of a payload, and mask, offset and limit of each byte for each test."""
    kinds = np.zeros(form.payload_bytes, np.uint8)  # ``_ZERO``
    for row in form.table:
        count, length, width, scales, shorts, codes, stride = (int(value) for value in row)
        ends = shorts + 2 * count * width
        kinds[scales:ends:2] = _LOW
        kinds[scales + 1 : shorts : 2] = _SCALE
        kinds[shorts + 1 : ends : 2] = _SHORT
        kinds[codes : codes + count * stride] = np.tile(_kinds_of_codes(length, form.bits), count)
    tests = _TESTS[: 1 if form.bits == 8 else 2]
    return kinds, tuple((mask[kinds], offset[kinds], limit[kinds]) for mask, offset, limit in tests)


def _kinds_of_codes(length: int, bits: int) -> Bytes:
    """The kinds of a component's bytes."""
    if bits == 8:
        return np.full(length, _CODE, np.uint8)
    is_code = (np.arange(-(-length // BLOCK) * BLOCK) < length).reshape(-1, 2, BLOCK // 2)
    low, high = is_code[:, 0].reshape(-1), is_code[:, 1].reshape(-1)
    return np.where(high, _PAIR, np.where(low, _LAST_PAIR, _NO_PAIR)).astype(np.uint8)
