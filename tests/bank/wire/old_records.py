"""Records of retired codecs, number by number, as older versions wrote them. Slow and obvious."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from bank_service.wire.record import FloatArray, GradientSpec

BLOCK = 64  # values with one scale


def sealed(payload: bytes, spec: GradientSpec, codec: str) -> bytes:
    """A record with a right checksum, whatever its payload."""
    fields = b"RGRD" + struct.pack("<HH16s", 1, 128, codec.encode())
    fields += bytes.fromhex(spec.fingerprint + spec.layout_id) + struct.pack("<QQ", spec.num_values, len(payload))
    return fields + hashlib.sha256(fields + payload).digest() + bytes(16) + payload


def old_record(values: FloatArray, spec: GradientSpec, codec: str) -> bytes:
    """A record of these values in bf16, int8 or int4."""
    if codec == "bf16":
        return sealed(b"".join(struct.pack("<f", value)[2:] for value in values.tolist()), spec, codec)
    largest_code = {"int8": 127, "int4": 7}[codec]
    scales, codes = b"", []
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].tolist()
        scale = struct.unpack("<f", struct.pack("<f", max(map(abs, block)) / largest_code))[0]
        scales += struct.pack("<f", scale)
        codes += [max(-largest_code, min(largest_code, round(value / scale))) if scale else 0 for value in block]
    if codec == "int8":
        return sealed(scales + struct.pack(f"<{len(codes)}b", *codes), spec, codec)
    return sealed(scales + nibbles(codes), spec, codec)


def nibbles(codes: list[int]) -> bytes:
    """Two codes of four bits in a byte, the first in the lower half, each as code + 8. Code 0 fills the last byte."""
    halves = [code + 8 for code in codes] + [8] * (len(codes) % 2)
    return bytes(low | high << 4 for low, high in zip(halves[::2], halves[1::2], strict=True))


def decoded(record: bytes, spec: GradientSpec, codec: str) -> FloatArray:
    """What ``old_record`` keeps, value by value."""
    payload, count = record[128:], spec.num_values
    if codec == "bf16":
        found = [struct.unpack("<f", b"\0\0" + payload[2 * at : 2 * at + 2])[0] for at in range(count)]
        return np.array(found, np.float32)
    num_scales = -(-count // BLOCK)
    scales = struct.unpack_from(f"<{num_scales}f", payload)
    rest = payload[4 * num_scales :]
    if codec == "int8":
        codes = list(struct.unpack(f"<{count}b", rest))
    else:
        codes = [((byte >> shift) & 15) - 8 for byte in rest for shift in (0, 4)][:count]
    return np.array([np.float32(scales[at // BLOCK]) * np.float32(code) for at, code in enumerate(codes)], np.float32)
