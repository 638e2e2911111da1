"""Codecs of four bits and of low rank: what they keep, and what they refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.codecs import crumbs, nibbles
from bank_service.wire.codecs.int4 import INT4_BLOCK
from bank_service.wire.codecs.lowrank import LowRankCodec
from bank_service.wire.codecs.sensitivity import Sensitivity
from bank_service.wire.record import (
    HEADER_BYTES,
    FloatArray,
    GradientFormatError,
    GradientSpec,
    decode_gradient,
    encode_gradient,
    verify_record,
)
from tests.bank.wire.test_codec import random_values, resealed

Part = Callable[[tuple[FloatArray, ...]], tuple[FloatArray, ...]]
SPEC = spec_of()
# As a learner's: A (rank, in), then B (out, rank), of two modules.
LEARNERS = GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((16, 576), (1536, 16), (16, 1536), (576, 16)))


def of_rank(rank: int, seed: int = 0, noise: float = 0.0) -> FloatArray:
    """Every tensor a sum of ``rank`` products, each of a tenth of the energy of the one before it."""
    random = np.random.default_rng(seed)
    parts = []
    for rows, columns in LEARNERS.shapes:
        tensor = noise * random.standard_normal((rows, columns))
        for number in range(rank):
            scale = 0.1 ** (number / 2)
            tensor += scale * np.outer(random.standard_normal(rows), random.standard_normal(columns))
        parts.append(tensor.reshape(-1))
    return np.concatenate(parts).astype(np.float32)


def error(values: FloatArray, codec: str) -> float:
    """Relative, of the whole vector."""
    decoded = decode_gradient(encode_gradient(values, LEARNERS, codec), LEARNERS)
    return float(np.linalg.norm(decoded - values) / np.linalg.norm(values))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200))
def test_int4_is_off_by_at_most_half_a_step_of_its_block(numbers: list[float]) -> None:
    values = np.array(numbers, dtype=np.float32)
    spec = GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((1, len(values)),))
    decoded = decode_gradient(encode_gradient(values, spec, "int4"), spec).astype(np.float64)
    for start in range(0, len(values), INT4_BLOCK):
        block = values[start : start + INT4_BLOCK].astype(np.float64)
        largest = np.abs(block).max()
        step = max(largest / 7 * (1 + 2.0**-23), largest / 7 + 2.0**-149 if largest else 0.0)
        assert np.abs(decoded[start : start + INT4_BLOCK] - block).max() <= step * (0.5 + 7 * 2.0**-24)


@given(st.lists(st.integers(-7, 7), max_size=40))
def test_codes_of_four_bits_come_back(codes: list[int]) -> None:
    packed = nibbles.pack(np.array(codes, np.int8))
    assert len(packed) == nibbles.num_bytes(len(codes))
    nibbles.check(packed, len(codes))
    assert nibbles.unpack(packed, len(codes)).tolist() == codes


@given(st.lists(st.sampled_from([-3, -1, 1, 3]), min_size=1, max_size=40))
def test_codes_of_two_bits_come_back(codes: list[int]) -> None:
    packed = crumbs.pack(np.array(codes, np.int8))
    assert len(packed) == crumbs.num_bytes(len(codes))
    crumbs.check(packed, len(codes))
    assert crumbs.unpack(packed, len(codes)).tolist() == codes
    if len(codes) % 4:
        packed[-1] |= 0xC0
        with pytest.raises(GradientFormatError, match="must be empty"):
            crumbs.check(packed, len(codes))


@pytest.mark.parametrize(("codec", "share"), [("lowrank64", 64), ("lowrank128", 128), ("lowrank256", 256)])
def test_a_low_rank_record_keeps_its_promise_of_size_whatever_the_gradient(codec: str, share: int) -> None:
    for values in (of_rank(1), of_rank(16), random_values(LEARNERS), np.zeros(LEARNERS.num_values, np.float32)):
        assert len(encode_gradient(values, LEARNERS, codec)) <= 4 * LEARNERS.num_values // share


def test_what_is_of_low_rank_is_kept_and_the_budget_goes_to_the_most_energy() -> None:
    assert error(of_rank(1), "lowrank64") < 0.12, "four bits a value of the long side"
    assert error(of_rank(1, noise=0.05), "lowrank64") < 0.14
    values = of_rank(1)
    values[: 16 * 576] *= 100.0  # nearly all the energy is in the first tensor
    assert error(values, "lowrank256") < 0.12
    decoded = decode_gradient(encode_gradient(values, LEARNERS, "lowrank256"), LEARNERS)
    kept = [bool(tensor.any()) for tensor in np.split(decoded, np.cumsum([16 * 576, 1536 * 16, 16 * 1536]))]
    assert kept[0] and not all(kept), "not everything fits, and the first tensor comes first"
    assert error(of_rank(3), "lowrank64") < error(of_rank(3), "lowrank128") < error(of_rank(3), "lowrank256") < 1


def test_short_vectors_are_fitted_to_what_the_long_ones_became() -> None:
    """No multiple of a decoded component would have been closer: the error is at right angles to it, but for bf16."""
    values = of_rank(1, noise=0.1)
    decoded = decode_gradient(encode_gradient(values, LEARNERS, "lowrank64"), LEARNERS).astype(np.float64)
    start = 0
    for rows, columns in LEARNERS.shapes:
        part = slice(start, start + rows * columns)
        energy = float(decoded[part] @ decoded[part])
        if energy:
            assert abs(float(decoded[part] @ (values[part] - decoded[part]))) < 0.01 * energy
        start = part.stop


def test_a_gradient_of_nothing_is_nothing() -> None:
    zero = np.zeros(LEARNERS.num_values, np.float32)
    record = encode_gradient(zero, LEARNERS, "lowrank64")
    assert len(record) == HEADER_BYTES + 1 + 2 * 4, "no component at all"
    assert not decode_gradient(record, LEARNERS).any()


def test_a_diverged_gradient_is_refused() -> None:
    with pytest.raises(GradientFormatError, match=r"2\*\*50"):
        encode_gradient(np.full(LEARNERS.num_values, 1e19, np.float32), LEARNERS, "lowrank64")


def record_of(counts: bytes, rest: bytes, version: bytes = b"\xff") -> bytes:
    """A record for LEARNERS with a right checksum and a payload of one's own."""
    payload = version + counts + rest
    head = bytearray(encode_gradient(of_rank(1), LEARNERS, "lowrank64")[:HEADER_BYTES])
    head[72:80] = len(payload).to_bytes(8, "little")
    body = bytes(head) + payload
    return body[:80] + hashlib.sha256(body[:80] + payload).digest() + body[112:]


@pytest.mark.parametrize(
    ("counts", "rest", "message"),
    [
        (bytes([9, 8, *bytes(6)]), b"", "tensor 0 must have at most 16 components, got 17"),
        (bytes([1, *bytes(7)]), b"", "must be 339 bytes, got 9"),
        (bytes([0, 1, *bytes(6)]), b"", "must be 195 bytes, got 9"),
        (bytes([8] * 8), bytes(5000), r"must be 4\.\.4096"),
        (bytes(7), b"", r"must begin with 9 bytes, got 8"),
        (bytes([1, *bytes(7)]), b"\xc0\x7f" + bytes(40) + b"\x88" * 288, "finite"),
        (bytes([1, *bytes(7)]), b"\x80\xbf" + bytes(40) + b"\x88" * 288, "scales"),
        (bytes([1, *bytes(7)]), bytes(42) + b"\x80" * 288, "-8"),
    ],
)  # fmt: skip
def test_a_low_rank_payload_that_can_not_be_is_refused_though_the_checksum_is_right(
    counts: bytes, rest: bytes, message: str
) -> None:
    with pytest.raises(GradientFormatError, match=message):
        verify_record(record_of(counts, rest), LEARNERS)


def test_a_payload_from_before_there_was_a_version_is_still_read() -> None:
    """One component of four bits of tensor 1: ranks, 12 scales, 16 short values, 1536 codes."""
    scales, shorts = np.full(12, 0x3F80, "<u2"), np.arange(16, dtype="<f4").view("<u4") >> 16
    codes = np.tile(np.array([1, -7], np.int8), 768)
    old = bytes([0, 1, 0, 0]) + scales.tobytes() + shorts.astype("<u2").tobytes() + nibbles.pack(codes).tobytes()
    values = decode_gradient(record_of(b"", old, version=b""), LEARNERS)
    assert not values[: 16 * 576].any()
    tensor = values[16 * 576 : 16 * 576 + 1536 * 16].reshape(1536, 16)
    assert np.array_equal(tensor, np.outer(codes, np.arange(16)).astype(np.float32))
    with pytest.raises(GradientFormatError, match="must be 828 bytes, got 827"):
        verify_record(record_of(b"", old[:-1], version=b""), LEARNERS)


def test_the_helper_makes_sound_records() -> None:
    record = record_of(bytes([1, *bytes(7)]), bytes(42) + b"\x88" * 288)
    assert not decode_gradient(record, LEARNERS).any()
    assert resealed(record, {}) == record


def test_what_is_left_of_a_components_last_byte_is_empty() -> None:
    spec = GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((4, 201),))
    values = random_values(spec)
    for codec, bits in ((LowRankCodec(1), 4), (LowRankCodec(10_000), 2)):  # all fits; hardly anything does
        payload = bytearray(codec.encode(values, spec))
        assert payload[1:3] == (bytes([4, 0]) if bits == 4 else bytes([0, 1]))
        codec.check(memoryview(payload), spec)
        payload[-1] ^= 1 << 6
        with pytest.raises(GradientFormatError, match="must be empty"):
            codec.check(memoryview(payload), spec)


def some_sensitivity(seed: int = 1) -> Sensitivity:
    """One in which a few directions matter most, as they do to a learner."""
    random = np.random.default_rng(seed)
    short, long = [], []
    for shape in LEARNERS.shapes:
        factor = random.standard_normal((min(shape), min(shape))) * 0.5 ** np.arange(min(shape))
        short.append((factor @ factor.T).astype(np.float32))
        long.append(np.exp(random.standard_normal(max(shape))).astype(np.float32))
    return Sensitivity(tuple(short), tuple(long))


def cost(error: FloatArray, sensitivity: Sensitivity) -> float:
    """By the definition, without damping."""
    total, start = 0.0, 0
    for (rows, columns), short, long in zip(LEARNERS.shapes, sensitivity.short, sensitivity.long, strict=True):
        tensor = error[start : start + rows * columns].reshape(rows, columns).astype(np.float64)
        side = tensor if columns >= rows else tensor.T
        total += float(np.einsum("ij,ik,kl,jl->", side, short, side, np.diag(long), optimize=True))
        start += rows * columns
    return total


@pytest.mark.parametrize("codec", ["lowrank64", "lowrank256"])
def test_a_sensitivity_decides_which_errors_are_made(codec: str) -> None:
    sensitivity = some_sensitivity()
    weighted = replace(LEARNERS, sensitivity=sensitivity)
    values = of_rank(16, noise=0.3)
    plain, chosen = (encode_gradient(values, spec, codec) for spec in (LEARNERS, weighted))
    assert len(chosen) <= 4 * LEARNERS.num_values // int(codec.removeprefix("lowrank"))
    errors = [decode_gradient(record, LEARNERS) - values for record in (plain, chosen)]  # a reader needs none
    assert cost(errors[1], sensitivity) < 0.8 * cost(errors[0], sensitivity)
    assert np.linalg.norm(errors[0]) < np.linalg.norm(errors[1])
    assert encode_gradient(values, weighted, codec) == chosen
    assert weighted == LEARNERS, "a gradient fits, whether or not it was made with one"


def test_directions_that_do_not_matter_are_left_out() -> None:
    plain = some_sensitivity()
    nothing = Sensitivity((np.zeros((16, 16), np.float32), *plain.short[1:]), plain.long)
    record = encode_gradient(of_rank(16), replace(LEARNERS, sensitivity=nothing), "lowrank64")
    assert record[HEADER_BYTES + 1 : HEADER_BYTES + 3] == bytes(2)
    assert not decode_gradient(record, LEARNERS)[: 16 * 576].any()
    blind = np.zeros(576, np.float32)
    record = encode_gradient(
        of_rank(16), replace(LEARNERS, sensitivity=Sensitivity(plain.short, (blind, *plain.long[1:]))), "lowrank64"
    )
    assert not decode_gradient(record, LEARNERS)[: 16 * 576].any()


@pytest.mark.parametrize(
    ("short", "long", "message"),
    [
        (lambda each: each[1:], lambda each: each, "must have 4 tensors, got 3, 4"),
        (lambda each: each, lambda each: (each[0][1:], *each[1:]), "tensor 0 .* must have sides 16 and 576"),
        (lambda each: (each[0] * np.nan, *each[1:]), lambda each: each, "tensor 0 .* finite"),
        (lambda each: each, lambda each: (*each[:3], -each[3]), "tensor 3 .* not negative"),
    ],
)
def test_a_sensitivity_of_something_else_is_refused(short: Part, long: Part, message: str) -> None:
    own = some_sensitivity()
    with pytest.raises(ValueError, match=message):
        replace(LEARNERS, sensitivity=Sensitivity(short(own.short), long(own.long)))
