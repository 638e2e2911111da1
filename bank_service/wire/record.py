"""Gradient records: a header of 128 bytes, and a payload in which a codec stores one document's δ.

The header is little-endian and has these fields:

- magic "RGRD", version u16, header size u16, codec (16 bytes of ASCII)
- learner fingerprint (32 bytes), layout id (8 bytes), num_values u64, payload_bytes u64
- SHA-256 (32 bytes) of the fields before it and of the payload, then zeros

The payload starts at a multiple of 64, so that an mmap of the record can be read in place.

The length of a record is checked first. The sizes in a header allocate no memory before that.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass

import numpy as np

from bank_service.wire.codecs import DEFAULT_CODEC, DENSE, check_choice, codec_named, encoder_named
from bank_service.wire.codecs.base import (
    MAX_VALUES,
    Buffer,
    FloatArray,
    GradientFormatError,
    GradientSpec,
    slices,
)
from bank_service.wire.codecs.retired import RETIRED_CODECS

__all__ = [
    "DEFAULT_CODEC", "DENSE", "HEADER_BYTES", "MAX_VALUES", "Buffer", "FloatArray", "GradientFormatError",
    "GradientHeader", "GradientSpec", "WrongLearnerError", "check_choice", "codec_named", "decode_gradient",
    "encode_gradient", "max_record_bytes", "read_header", "record_digest", "verify_record",
]  # fmt: skip

MAGIC = b"RGRD"
VERSION = 1
HEADER_BYTES = 128

_HEADER = struct.Struct("<4sHH16s32s8sQQ")  # followed by the checksum and zeros
_CHECKSUM_BYTES = 32
_PADDING = bytes(HEADER_BYTES - _HEADER.size - _CHECKSUM_BYTES)


class WrongLearnerError(GradientFormatError):
    """A sound record belongs to another learner or layout. The error has both fingerprints."""

    def __init__(self, message: str, *, expected: str, actual: str) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


@dataclass(frozen=True, slots=True)
class GradientHeader:
    """The header of a record."""

    codec: str
    fingerprint: str
    layout_id: str
    num_values: int
    payload_bytes: int
    checksum: bytes  # SHA-256, 32 bytes

    @property
    def record_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes


def max_record_bytes(spec: GradientSpec) -> int:
    """The largest size of a record of ``spec`` in any codec, in bytes."""
    largest = (DENSE.name, *RETIRED_CODECS, "factors-99-99-8", "factors-99-99-4")
    return HEADER_BYTES + max(codec_named(name).max_payload_bytes(spec) for name in largest)


def record_digest(record: Buffer) -> str:
    """SHA-256 of the whole record, 64 hex digits. It names the gradient everywhere."""
    return hashlib.sha256(record).hexdigest()


def encode_gradient(values: FloatArray, spec: GradientSpec, codec: str) -> bytes:
    """Encodes δ, float32 (num_values,), as a record.

    GradientFormatError for another shape or type, NaN or infinity, and for a codec that is retired or unknown.
    """
    chosen = encoder_named(codec)
    if values.dtype != np.float32 or values.shape != (spec.num_values,):
        raise GradientFormatError(
            f"values must be float32 of shape ({spec.num_values},), got {values.dtype} {values.shape}"
        )
    values = np.ascontiguousarray(values)
    for part in slices(spec.num_values):
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
    """Reads and checks the header. It does not verify the payload. GradientFormatError."""
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


def verify_record(record: Buffer, spec: GradientSpec, *, with_checksum: bool = True) -> GradientHeader:
    """Verifies a record without decoding it, so that ``decode_gradient`` will succeed.

    with_checksum: off if the caller has compared the record's bytes with its digest.
    WrongLearnerError for a sound record of another learner or layout. GradientFormatError for any other fault.
    """
    header = read_header(record)
    view = memoryview(record).cast("B")
    if header.record_bytes != view.nbytes:
        raise GradientFormatError(f"the record must have {header.record_bytes} bytes by its header, got {view.nbytes}")
    payload = view[HEADER_BYTES:]
    if with_checksum and _checksum(view[: _HEADER.size], payload) != header.checksum:
        raise GradientFormatError("the checksum must match the record's bytes, got another; the record is corrupt")
    _check_learner(header, spec)
    codec_named(header.codec).check(payload, spec)
    return header


def decode_gradient(record: Buffer, spec: GradientSpec, out: FloatArray | None = None) -> FloatArray:
    """Verifies a record and decodes its δ, float32 (num_values,). Writes it into ``out`` if given.

    WrongLearnerError, GradientFormatError; they leave ``out`` unchanged. ValueError if ``out`` has another shape or
    type.
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
