"""Gradient records: a header of 128 bytes and a payload that a codec made of one document's δ.

Header, little-endian: magic "RGRD", version u16, header size u16, codec (16 bytes of ASCII), learner
fingerprint (32), layout id (8), num_values u64, payload_bytes u64, SHA-256 (32) of the header before it and
of the payload, zeros. The payload starts at a multiple of 64, so that an mmap of the record can be read in place.

A record is checked from its length inwards: nothing is allocated by a size that the record only claims.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Buffer = bytes | bytearray | memoryview

MAGIC = b"RGRD"
VERSION = 1
HEADER_BYTES = 128
MAX_VALUES = 2**30  # far above any learner: rank 16 on all of an 8B model is 2**25
INT8_BLOCK = 64
MAX_INT8_SCALE = 2.0**121  # 127 times as much is still finite in float32

_HEADER = struct.Struct("<4sHH16s32s8sQQ")  # followed by the checksum and zeros
_CHECKSUM_BYTES = 32
_PADDING = bytes(HEADER_BYTES - _HEADER.size - _CHECKSUM_BYTES)
_SLICE_VALUES = 2**20  # values worked on at once; a multiple of every block size


class GradientFormatError(ValueError):
    """A gradient record, or the values for one, break the format."""


class WrongLearnerError(GradientFormatError):
    """A sound record of another learner or layout. Carries both fingerprints."""

    def __init__(self, message: str, *, expected: str, actual: str) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


@dataclass(frozen=True, slots=True)
class GradientSpec:
    """What a gradient must be: its learner and the tensors in its flat vector."""

    fingerprint: str  # of the learner, 64 hex digits
    layout_id: str  # 16 hex digits
    shapes: tuple[tuple[int, int], ...]  # of each tensor in layout order, for codecs that work per tensor

    def __post_init__(self) -> None:
        for name, value, digits in (("fingerprint", self.fingerprint, 64), ("layout_id", self.layout_id, 16)):
            if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                raise ValueError(f"{name} must be {digits} lower-case hex digits, got {value[:80]!r}")
        if not self.shapes or any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes):
            raise ValueError(f"shapes must be pairs of positive sizes, got {self.shapes!r:.200}")
        if self.num_values > MAX_VALUES:
            raise ValueError(f"num_values must be at most {MAX_VALUES}, got {self.num_values}")

    @property
    def num_values(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True, slots=True)
class GradientHeader:
    """What a record says about itself."""

    codec: str
    fingerprint: str
    layout_id: str
    num_values: int
    payload_bytes: int
    checksum: bytes  # SHA-256, 32 bytes

    @property
    def record_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes


class Codec(Protocol):
    """Values ↔ payload. Payloads are canonical: equal values give equal bytes."""

    @property
    def name(self) -> str:
        """1 to 16 characters of ASCII, as it stands in the header."""

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        """No payload for ``spec`` is larger."""

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        """Payload of finite ``values`` (num_values,). GradientFormatError where they don't fit its range."""

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        """GradientFormatError unless ``decode`` would succeed with finite values. Allocates nothing large."""

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        """Writes a checked payload's values into ``out`` (num_values,)."""


def _slices(num_values: int) -> Iterator[slice]:
    for start in range(0, num_values, _SLICE_VALUES):
        yield slice(start, min(start + _SLICE_VALUES, num_values))


def _check_length(codec: str, payload: memoryview, expected: int) -> None:
    if payload.nbytes != expected:
        raise GradientFormatError(f"a {codec} payload must be {expected} bytes for this layout, got {payload.nbytes}")


class Bf16Codec:
    """The upper half of each float32, rounded to nearest, ties to even. 2 bytes a value."""

    name = "bf16"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 2 * spec.num_values

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        halves = np.empty(spec.num_values, dtype="<u2")
        for part in _slices(spec.num_values):
            bits = values[part].view(np.uint32)
            halves[part] = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
        payload = halves.tobytes()
        self.check(memoryview(payload), spec)  # the largest float32 values round to infinity
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        _check_length(self.name, payload, self.max_payload_bytes(spec))
        halves = np.frombuffer(payload, dtype="<u2")
        for part in _slices(spec.num_values):
            if bool(((halves[part] & 0x7F80) == 0x7F80).any()):
                raise GradientFormatError("values must be finite in bf16, got NaN, infinity or more than 3.39e38")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        halves = np.frombuffer(payload, dtype="<u2")
        for part in _slices(spec.num_values):
            np.left_shift(halves[part], 16, out=out[part].view(np.uint32), dtype=np.uint32)


class Int8Codec:
    """Blocks of 64 values: one float32 scale, 64 codes in -127..127; value = scale · code. 1.0625 bytes a value.

    A block's scale is the smallest float32 s with 127·s ≥ max|value|, its codes are value / s rounded to
    nearest, ties to even: no value is off by more than s/2 (but for the product's own float32 rounding).
    Payload: all scales, then all codes.
    """

    name = "int8"

    def max_payload_bytes(self, spec: GradientSpec) -> int:
        return 4 * self._num_blocks(spec) + spec.num_values

    def encode(self, values: FloatArray, spec: GradientSpec) -> bytes:
        scales = np.empty(self._num_blocks(spec), dtype="<f4")
        codes = np.empty(spec.num_values, dtype=np.int8)
        for part in _slices(spec.num_values):
            blocks = self._blocks(values[part].astype(np.float64))
            largest = np.abs(blocks).max(axis=1)
            scale = (largest / 127.0).astype(np.float32)
            # Rounding may have made the scale too small for its largest value; subnormal scales by far.
            scale = np.where(scale.astype(np.float64) * 127.0 < largest, np.nextafter(scale, np.float32(np.inf)), scale)
            scales[part.start // INT8_BLOCK : part.start // INT8_BLOCK + len(scale)] = scale
            divisor = np.where(scale > 0, scale.astype(np.float64), 1.0)
            blocks /= divisor[:, np.newaxis]
            codes[part] = np.rint(blocks).reshape(-1)[: part.stop - part.start]
        payload = scales.tobytes() + codes.tobytes()
        self.check(memoryview(payload), spec)
        return payload

    def check(self, payload: memoryview, spec: GradientSpec) -> None:
        _check_length(self.name, payload, self.max_payload_bytes(spec))
        scales, codes = self._parts(payload, spec)
        for part in _slices(len(scales)):
            # Not "scale > limit": NaN must fail too.
            if not bool(((scales[part] >= 0) & (scales[part] <= MAX_INT8_SCALE)).all()):
                raise GradientFormatError("int8 scales must be in 0..2**121 (values below 3.37e38), got others")
        for part in _slices(spec.num_values):
            if bool((codes[part] == -128).any()):
                raise GradientFormatError("int8 codes must be in -127..127, got -128")

    def decode(self, payload: memoryview, spec: GradientSpec, out: FloatArray) -> None:
        scales, codes = self._parts(payload, spec)
        whole = spec.num_values // INT8_BLOCK * INT8_BLOCK
        blocks = out[:whole].reshape(-1, INT8_BLOCK)
        np.multiply(codes[:whole].reshape(-1, INT8_BLOCK), scales[: len(blocks), np.newaxis], out=blocks)
        if whole < spec.num_values:
            np.multiply(codes[whole:], scales[-1], out=out[whole:])

    def _num_blocks(self, spec: GradientSpec) -> int:
        return -(-spec.num_values // INT8_BLOCK)

    def _parts(self, payload: memoryview, spec: GradientSpec) -> tuple[FloatArray, npt.NDArray[np.int8]]:
        num_blocks = self._num_blocks(spec)
        scales = np.frombuffer(payload, dtype="<f4", count=num_blocks)
        return scales, np.frombuffer(payload, dtype=np.int8, offset=4 * num_blocks)

    def _blocks(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``values`` as (blocks, 64), the last block filled with zeros."""
        return np.pad(values, (0, -len(values) % INT8_BLOCK)).reshape(-1, INT8_BLOCK)


def _registry(*codecs: Codec) -> Mapping[str, Codec]:
    return MappingProxyType({codec.name: codec for codec in codecs})


CODECS: Mapping[str, Codec] = _registry(Bf16Codec(), Int8Codec())
DEFAULT_CODEC = Int8Codec.name


def codec_named(name: str) -> Codec:
    """The codec of that name; GradientFormatError lists the known ones."""
    if name not in CODECS:
        raise GradientFormatError(f"codec must be one of {', '.join(sorted(CODECS))}, got {name!r}")
    return CODECS[name]


def max_record_bytes(spec: GradientSpec) -> int:
    """No record of ``spec`` is larger, whatever its codec."""
    return HEADER_BYTES + max(codec.max_payload_bytes(spec) for codec in CODECS.values())


def record_digest(record: Buffer) -> str:
    """SHA-256 of the whole record, 64 hex digits: the gradient's name everywhere."""
    return hashlib.sha256(record).hexdigest()


def encode_gradient(values: FloatArray, spec: GradientSpec, codec: str) -> bytes:
    """Record of δ (float32, (num_values,)). GradientFormatError for another shape or type, NaN or infinity."""
    chosen = codec_named(codec)
    if values.dtype != np.float32 or values.shape != (spec.num_values,):
        raise GradientFormatError(
            f"values must be float32 of shape ({spec.num_values},), got {values.dtype} {values.shape}"
        )
    values = np.ascontiguousarray(values)
    for part in _slices(spec.num_values):
        if not bool(np.isfinite(values[part]).all()):
            raise GradientFormatError("values must be finite, got NaN or infinity; the gradient diverged")
    payload = chosen.encode(values, spec)
    fields = _HEADER.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        codec.encode("ascii"),
        bytes.fromhex(spec.fingerprint),
        bytes.fromhex(spec.layout_id),
        spec.num_values,
        len(payload),
    )
    return b"".join((fields, _checksum(fields, payload), _PADDING, payload))


def read_header(record: Buffer) -> GradientHeader:
    """The header, checked for itself but not against the payload. GradientFormatError."""
    view = memoryview(record).cast("B")
    if view.nbytes < HEADER_BYTES:
        raise GradientFormatError(f"a record must have at least {HEADER_BYTES} bytes, got {view.nbytes}")
    magic, version, header_bytes, codec, fingerprint, layout_id, num_values, payload_bytes = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise GradientFormatError(f"a record must start with {MAGIC!r}, got {magic!r}; is it a gradient record?")
    if version != VERSION or header_bytes != HEADER_BYTES:
        raise GradientFormatError(
            f"version must be {VERSION} with a header of {HEADER_BYTES} bytes, got {version} with {header_bytes}"
        )
    name = codec.rstrip(b"\0")
    if not re.fullmatch(rb"[a-z0-9_-]{1,16}", name):
        raise GradientFormatError(f"the codec's name must be 1 to 16 of a-z 0-9 _ -, got {codec!r}")
    if not 1 <= num_values <= MAX_VALUES:
        raise GradientFormatError(f"num_values must be in 1..{MAX_VALUES}, got {num_values}")
    if view[_HEADER.size + _CHECKSUM_BYTES : HEADER_BYTES] != _PADDING:
        raise GradientFormatError("the header's last bytes must be zero, got others")
    checksum = bytes(view[_HEADER.size : _HEADER.size + _CHECKSUM_BYTES])
    return GradientHeader(name.decode(), fingerprint.hex(), layout_id.hex(), num_values, payload_bytes, checksum)


def verify_record(record: Buffer, spec: GradientSpec) -> GradientHeader:
    """Everything that ``decode_gradient`` needs, without decoding.

    WrongLearnerError for a sound record of another learner or layout, GradientFormatError for all else.
    """
    header = read_header(record)
    view = memoryview(record).cast("B")
    if header.record_bytes != view.nbytes:
        raise GradientFormatError(f"the record must have {header.record_bytes} bytes by its header, got {view.nbytes}")
    payload = view[HEADER_BYTES:]
    if _checksum(view[: _HEADER.size], payload) != header.checksum:
        raise GradientFormatError("the checksum must match the record's bytes, got another; the record is corrupt")
    _check_learner(header, spec)
    codec_named(header.codec).check(payload, spec)
    return header


def decode_gradient(record: Buffer, spec: GradientSpec, out: FloatArray | None = None) -> FloatArray:
    """δ of a verified record, float32 (num_values,), in ``out`` where given.

    WrongLearnerError, GradientFormatError; ``out`` is then untouched. ValueError for an unfit ``out``.
    """
    if out is not None and not (
        out.dtype == np.float32 and out.shape == (spec.num_values,) and out.flags.c_contiguous and out.flags.writeable
    ):
        raise ValueError(
            f"out must be writeable contiguous float32 of shape ({spec.num_values},), got {out.dtype} {out.shape}"
        )
    header = verify_record(record, spec)
    values = np.empty(spec.num_values, dtype=np.float32) if out is None else out
    codec_named(header.codec).decode(memoryview(record).cast("B")[HEADER_BYTES:], spec, values)
    return values


def _checksum(fields: Buffer, payload: Buffer) -> bytes:
    state = hashlib.sha256(fields)
    state.update(payload)
    return state.digest()


def _check_learner(header: GradientHeader, spec: GradientSpec) -> None:
    if header.fingerprint != spec.fingerprint:
        raise WrongLearnerError(
            f"the gradient must be of learner {spec.fingerprint}, got one of {header.fingerprint}; "
            "encode the document with this learner",
            expected=spec.fingerprint,
            actual=header.fingerprint,
        )
    if (header.layout_id, header.num_values) != (spec.layout_id, spec.num_values):
        raise WrongLearnerError(
            f"the gradient must have layout {spec.layout_id} with {spec.num_values} values for learner "
            f"{spec.fingerprint}, got {header.layout_id} with {header.num_values}",
            expected=spec.fingerprint,
            actual=header.fingerprint,
        )
