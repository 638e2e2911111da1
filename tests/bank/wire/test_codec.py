from __future__ import annotations

import hashlib
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.record import (
    DEFAULT_CODEC,
    DENSE,
    HEADER_BYTES,
    MAX_VALUES,
    FloatArray,
    GradientFormatError,
    GradientSpec,
    WrongLearnerError,
    check_choice,
    decode_gradient,
    encode_gradient,
    max_record_bytes,
    read_header,
    record_digest,
    verify_record,
)

NAMES = (DENSE.name, DEFAULT_CODEC, "factors-4-1-4")
SPEC = spec_of()


def random_values(spec: GradientSpec = SPEC, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(spec.num_values).astype(np.float32)


def spec_of_size(num_values: int) -> GradientSpec:
    return GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((1, num_values),))


def resealed(record: bytes, changes: dict[int, bytes]) -> bytes:
    """The record with bytes changed and its checksum made right again, as a malicious writer would."""
    body = bytearray(record)
    for offset, content in changes.items():
        body[offset : offset + len(content)] = content
    body[80:112] = hashlib.sha256(bytes(body[:80] + body[HEADER_BYTES:])).digest()
    return bytes(body)


def test_the_helper_reseals_an_unchanged_record_to_itself() -> None:
    record = encode_gradient(random_values(), SPEC, DEFAULT_CODEC)
    assert resealed(record, {}) == record


@pytest.mark.parametrize("codec", NAMES)
def test_a_header_tells_what_was_encoded(codec: str) -> None:
    record = encode_gradient(random_values(), SPEC, codec)
    header = verify_record(record, SPEC)
    assert (header.codec, header.fingerprint, header.layout_id) == (codec, SPEC.fingerprint, SPEC.layout_id)
    assert (header.num_values, header.record_bytes) == (SPEC.num_values, len(record))
    assert header == read_header(record)
    assert len(record) <= max_record_bytes(SPEC)


@pytest.mark.parametrize("codec", NAMES)
def test_equal_values_give_equal_bytes_and_other_values_another_digest(codec: str) -> None:
    record = encode_gradient(random_values(), SPEC, codec)
    assert encode_gradient(random_values(), SPEC, codec) == record
    assert record_digest(record) == hashlib.sha256(record).hexdigest()
    assert record_digest(encode_gradient(random_values(seed=1), SPEC, codec)) != record_digest(record)


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decoding_into_an_array_gives_what_decoding_alone_gives(codec: str, kind: Any) -> None:
    record = encode_gradient(random_values(), SPEC, codec)
    out = np.full(SPEC.num_values, np.nan, dtype=np.float32)
    assert decode_gradient(kind(record), SPEC, out) is out
    np.testing.assert_array_equal(out, decode_gradient(record, SPEC))


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    values = random_values()
    values[-1] = bad
    with pytest.raises(GradientFormatError, match="finite"):
        encode_gradient(values, SPEC, codec)


@pytest.mark.parametrize(
    "values", [np.zeros(3, np.float32), np.zeros((31, 4), np.float32), np.zeros(SPEC.num_values, np.float64)]
)
def test_values_of_another_shape_or_type_are_refused(values: Any) -> None:
    with pytest.raises(GradientFormatError, match=r"float32 of shape \(124,\)"):
        encode_gradient(values, SPEC, DEFAULT_CODEC)


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(GradientFormatError, match="codec must be factors-P-Q-BITS .* or fp32, got 'int3'"):
        encode_gradient(random_values(), SPEC, "int3")
    unknown = resealed(encode_gradient(random_values(), SPEC, "fp32"), {8: b"int3"})
    with pytest.raises(GradientFormatError, match="codec must be factors-P-Q-BITS .* or fp32, got 'int3'"):
        decode_gradient(unknown, SPEC)


def test_fp32_keeps_every_bit() -> None:
    assert np.array_equal(decode_gradient(encode_gradient(random_values(), SPEC, "fp32"), SPEC), random_values())
    record = encode_gradient(random_values(), SPEC, "fp32")
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(GradientFormatError, match="finite in fp32"):
            verify_record(resealed(record, {len(record) - 4: struct.pack("<f", bad)}), SPEC)


@pytest.mark.parametrize("codec", ["fp32", "int8", "lowrank64", "zip"])
def test_a_collection_can_have_factors_alone(codec: str) -> None:
    check_choice(DEFAULT_CODEC)
    with pytest.raises(GradientFormatError, match=f"must be factors-P-Q-BITS .*, got '{codec}'; {DEFAULT_CODEC} is"):
        check_choice(codec)


def test_another_learners_gradient_is_refused_with_both_fingerprints() -> None:
    other = spec_of("another learner")
    with pytest.raises(WrongLearnerError) as caught:
        decode_gradient(encode_gradient(random_values(), other, DEFAULT_CODEC), SPEC)
    assert (caught.value.expected, caught.value.actual) == (SPEC.fingerprint, other.fingerprint)
    assert SPEC.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        GradientSpec(SPEC.fingerprint, "0" * 16, SPEC.shapes),
        GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((1, 64),)),
    ],
)
def test_another_layouts_gradient_is_refused(other: GradientSpec) -> None:
    with pytest.raises(WrongLearnerError, match=SPEC.layout_id):
        verify_record(encode_gradient(random_values(other), other, DEFAULT_CODEC), SPEC)


@pytest.mark.parametrize("codec", NAMES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_truncation_is_refused(codec: str, data: st.DataObject) -> None:
    record = encode_gradient(random_values(), SPEC, codec)
    with pytest.raises(GradientFormatError):
        verify_record(record[: data.draw(st.integers(0, len(record) - 1))], SPEC)


@pytest.mark.parametrize("codec", NAMES)
def test_every_flipped_byte_is_refused(codec: str) -> None:
    record = encode_gradient(random_values(), SPEC, codec)
    for place in range(len(record)):
        for mask in (0x01, 0x80, 0xFF):
            with pytest.raises(GradientFormatError):
                verify_record(record[:place] + bytes([record[place] ^ mask]) + record[place + 1 :], SPEC)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=400), st.binary(max_size=400).map(lambda tail: b"RGRD\1\0\x80\0fp32" + tail)))
def test_random_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(GradientFormatError):
        decode_gradient(junk, SPEC)


@pytest.mark.parametrize("num_values", [0, MAX_VALUES, MAX_VALUES + 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("payload_bytes", [0, 2**40, 2**64 - 1])
def test_absurd_sizes_are_refused_and_nothing_large_is_allocated(num_values: int, payload_bytes: int) -> None:
    record = encode_gradient(random_values(), SPEC, DEFAULT_CODEC)
    absurd = resealed(record, {64: struct.pack("<QQ", num_values, payload_bytes)})
    tracemalloc.start()
    try:
        with pytest.raises(GradientFormatError):
            decode_gradient(absurd, SPEC)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", NAMES)
def test_a_bad_record_of_full_size_is_refused_before_the_values_are_allocated(codec: str) -> None:
    spec = spec_of_size(4_000_000)
    record = bytearray(encode_gradient(random_values(spec), spec, codec))
    record[-1] ^= 1
    tracemalloc.start()
    try:
        with pytest.raises(GradientFormatError, match="checksum"):
            decode_gradient(record, spec)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", NAMES)
def test_a_payload_of_another_size_is_refused_though_the_checksum_is_right(codec: str) -> None:
    record = encode_gradient(random_values(), SPEC, codec) + b"\0"
    grown = resealed(record, {72: struct.pack("<Q", len(record) - HEADER_BYTES)})
    with pytest.raises(GradientFormatError, match="payload must be"):
        verify_record(grown, SPEC)


def test_a_refused_record_leaves_the_array_as_it_was() -> None:
    record = bytearray(encode_gradient(random_values(), SPEC, DEFAULT_CODEC))
    record[-1] ^= 1
    out = np.full(SPEC.num_values, 7, dtype=np.float32)
    with pytest.raises(GradientFormatError):
        decode_gradient(record, SPEC, out)
    assert (out == 7).all()


@pytest.mark.parametrize("out", [np.zeros(3, np.float32), np.zeros(248, np.float32)[::2], np.zeros(124)])
def test_an_unfit_array_to_decode_into_is_refused(out: Any) -> None:
    with pytest.raises(ValueError, match="out must be"):
        decode_gradient(encode_gradient(random_values(), SPEC, DEFAULT_CODEC), SPEC, out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": "A" * 64}, "fingerprint must be 64"),
        ({"fingerprint": "a" * 63}, "fingerprint must be 64"),
        ({"layout_id": "a" * 17}, "layout_id must be 16"),
        ({"shapes": ()}, "shapes"),
        ({"shapes": ((0, 4),)}, "shapes"),
        ({"shapes": ((2**20, 2**20),)}, "num_values"),
    ],
)
def test_a_spec_is_checked_when_it_is_born(fields: dict[str, Any], message: str) -> None:
    good = {"fingerprint": SPEC.fingerprint, "layout_id": SPEC.layout_id, "shapes": SPEC.shapes}
    with pytest.raises(ValueError, match=message):
        GradientSpec(**(good | fields))
