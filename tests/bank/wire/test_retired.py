"""Records of retired codecs are read as they were written."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.codecs.retired import RETIRED_CODECS
from bank_service.wire.record import (
    HEADER_BYTES,
    FloatArray,
    GradientFormatError,
    GradientSpec,
    decode_gradient,
    encode_gradient,
    max_record_bytes,
    verify_record,
)
from tests.bank.wire.old_records import decoded, nibbles, old_record, sealed
from tests.bank.wire.test_codec import random_values, resealed

SPEC = spec_of()
WIDE = GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((4, 201), (130, 4), (3, 3)))
DENSE = ("bf16", "int8", "int4")
LOW_RANK = ("lowrank32", "lowrank64", "lowrank128", "lowrank256")


def test_every_codec_that_was_retired_can_be_read() -> None:
    assert sorted(RETIRED_CODECS) == sorted(DENSE + LOW_RANK)


@pytest.mark.parametrize("codec", DENSE + LOW_RANK)
def test_no_record_is_written_in_a_retired_codec(codec: str) -> None:
    with pytest.raises(GradientFormatError, match=f"must be factors-P-Q-BITS .*got '{codec}'"):
        encode_gradient(random_values(), SPEC, codec)


@pytest.mark.parametrize("spec", [SPEC, WIDE])
@pytest.mark.parametrize(("codec", "error"), [("bf16", 0.02), ("int8", 0.03), ("int4", 0.4)])
def test_a_dense_record_decodes_to_what_it_says(codec: str, error: float, spec: GradientSpec) -> None:
    values = random_values(spec)
    record = old_record(values, spec, codec)
    assert len(record) <= max_record_bytes(spec)
    found = decode_gradient(record, spec)
    np.testing.assert_array_equal(found, decoded(record, spec, codec))
    np.testing.assert_allclose(found, values, atol=error)


def bf16(values: FloatArray) -> bytes:
    """Cut, not rounded."""
    return b"".join(struct.pack("<f", value)[2:] for value in values.reshape(-1).tolist())


def low_rank(counts: list[tuple[int, int]], seed: int = 0, *, is_oldest: bool = False) -> tuple[bytes, FloatArray]:
    """(payload, values) of random components for WIDE. counts: of four and of two bits, of each tensor."""
    random = np.random.default_rng(seed)
    scales, shorts, codes, tensors = b"", b"", b"", []
    for (four, two), (rows, columns) in zip(counts, WIDE.shapes, strict=True):
        tensor = np.zeros((rows, columns), np.float32)
        length, width = max(rows, columns), min(rows, columns)
        for bits in [4] * four + [2] * two:
            steps = 2.0 ** random.integers(-3, 3, -(-length // 128))  # exact in bf16, and so are products and sums
            short = random.integers(-9, 9, width).astype(np.float32)
            own = random.integers(-7, 8, length) if bits == 4 else random.choice([-3, -1, 1, 3], length)
            long = np.array([steps[at // 128] * own[at] for at in range(length)], np.float32)
            tensor += np.outer(short, long) if columns >= rows else np.outer(long, short)
            scales += bf16(steps.astype(np.float32))
            shorts += bf16(short)
            codes += nibbles(own.tolist()) if bits == 4 else crumbs(own.tolist())
        tensors.append(tensor.reshape(-1))
    head = bytes(four for four, _ in counts) if is_oldest else bytes([255, *(n for pair in counts for n in pair)])
    return head + scales + shorts + codes, np.concatenate(tensors)


def crumbs(codes: list[int]) -> bytes:
    """Four codes of two bits in a byte."""
    quarters = [(code + 3) // 2 for code in codes] + [0] * (-len(codes) % 4)
    return bytes(sum(quarters[at + n] << 2 * n for n in range(4)) for at in range(0, len(quarters), 4))


@pytest.mark.parametrize("codec", LOW_RANK)
@pytest.mark.parametrize("counts", [[(2, 1), (0, 4), (1, 2)], [(0, 0), (1, 0), (0, 0)], [(0, 0)] * 3])
def test_a_record_of_low_rank_decodes_to_its_components(codec: str, counts: list[tuple[int, int]]) -> None:
    payload, values = low_rank(counts)
    assert bool(values.any()) == any(map(any, counts))
    np.testing.assert_array_equal(decode_gradient(sealed(payload, WIDE, codec), WIDE), values)


def test_a_payload_from_before_there_was_a_version_is_still_read() -> None:
    payload, values = low_rank([(2, 0), (0, 0), (3, 0)], is_oldest=True)
    np.testing.assert_array_equal(decode_gradient(sealed(payload, WIDE, "lowrank64"), WIDE), values)
    with pytest.raises(GradientFormatError, match=f"must be {len(payload)} bytes .*, got {len(payload) - 1}"):
        verify_record(sealed(payload[:-1], WIDE, "lowrank64"), WIDE)


@pytest.mark.parametrize(
    ("codec", "place", "content", "message"),
    [
        ("int8", 0, struct.pack("<f", np.nan), "int8 scales"),
        ("int8", 0, struct.pack("<f", -1.0), "int8 scales"),
        ("int8", 0, struct.pack("<f", 3e38), "int8 scales"),
        ("int8", -1, b"\x80", "int8 codes must be above -128"),
        ("int4", 0, struct.pack("<f", np.inf), "int4 scales"),
        ("int4", -1, b"\x08", "int4 codes must be above -8"),
        ("bf16", 0, b"\x80\x7f", "finite in bf16"),
        ("bf16", -2, b"\xc0\xff", "finite in bf16"),
    ],
)  # fmt: skip
def test_numbers_that_can_not_be_are_refused_though_the_checksum_is_right(
    codec: str, place: int, content: bytes, message: str
) -> None:
    record = old_record(random_values(), SPEC, codec)
    at = HEADER_BYTES + place if place >= 0 else len(record) + place
    with pytest.raises(GradientFormatError, match=message):
        verify_record(resealed(record, {at: content}), SPEC)


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (1, bytes([3, 2]), "tensor 0 must have at most 4 components, got 5"),
        (1, bytes([3, 1]), r"must be \d+ bytes"),
        (7, b"\xc0\x7f", "finite"),
        (7, b"\x80\xbf", "scales"),
        (-1, b"\x00", "codes must be in -7..7, got -8"),
    ],
)
def test_a_payload_of_low_rank_that_can_not_be_is_refused(place: int, content: bytes, message: str) -> None:
    payload = bytearray(low_rank([(2, 1), (0, 4), (3, 0)])[0])
    verify_record(sealed(bytes(payload), WIDE, "lowrank64"), WIDE)
    payload[place : place + len(content) or None] = content
    with pytest.raises(GradientFormatError, match=message):
        verify_record(sealed(bytes(payload), WIDE, "lowrank64"), WIDE)


@pytest.mark.parametrize("codec", DENSE + LOW_RANK)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_size_is_refused(codec: str, change: int) -> None:
    payload = low_rank([(2, 1)] * 3)[0] if codec in LOW_RANK else old_record(random_values(WIDE), WIDE, codec)[128:]
    other = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(GradientFormatError, match="payload must be"):
        verify_record(sealed(other, WIDE, codec), WIDE)


@pytest.mark.parametrize("length", [0, 2, 6])
def test_a_payload_shorter_than_its_counts_is_refused(length: int) -> None:
    with pytest.raises(GradientFormatError, match="must begin with"):
        verify_record(sealed(b"\xff" * length, WIDE, "lowrank64"), WIDE)
