"""The codec of factors: what it keeps, where it puts it, and what it refuses."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.codecs.factors import (
    CODES,
    COUNT,
    LONG,
    SCALES,
    SHORT,
    SHORTS,
    STRIDE,
    factor_form,
    is_factors,
)
from bank_service.wire.record import (
    HEADER_BYTES,
    FloatArray,
    GradientFormatError,
    GradientSpec,
    check_choice,
    codec_named,
    decode_gradient,
    encode_gradient,
    max_record_bytes,
    verify_record,
)
from tests.bank.wire.test_codec import random_values, resealed

SPEC = spec_of()
# As a learner's: A (rank, in), then B (out, rank). The last two modules are smaller than the rank.
LEARNERS = GradientSpec(
    SPEC.fingerprint, SPEC.layout_id, ((16, 576), (1536, 16), (16, 200), (130, 16), (16, 3), (5, 16), (16, 1), (1, 16))
)
CODECS = ("factors-4-1-8", "factors-4-1-4", "factors-4-0-8", "factors-1-0-4", "factors-16-16-8", "factors-16-16-4")
Matrix = NDArray[np.float64]


def tensors_of(values: FloatArray, spec: GradientSpec) -> list[Matrix]:
    """Each tensor with the rank's side first."""
    parts = np.split(values.astype(np.float64), np.cumsum([rows * columns for rows, columns in spec.shapes])[:-1])
    found = [part.reshape(shape) for part, shape in zip(parts, spec.shapes, strict=True)]
    return [tensor.T if index % 2 else tensor for index, tensor in enumerate(found)]


def of_rank(rank: int, spec: GradientSpec = LEARNERS, seed: int = 0, noise: float = 0.0) -> FloatArray:
    """Every tensor a sum of ``rank`` products, each of a tenth of the energy of the one before it."""
    random = np.random.default_rng(seed)
    parts = []
    for shape in spec.shapes:
        tensor = noise * random.standard_normal(shape)
        for number in range(rank):
            scale = 0.1 ** (number / 2)
            tensor += scale * np.outer(random.standard_normal(shape[0]), random.standard_normal(shape[1]))
        parts.append(tensor.reshape(-1))
    return np.concatenate(parts).astype(np.float32)


def read_slowly(payload: bytes, codec: str, spec: GradientSpec) -> FloatArray:
    """The values of a payload, number by number, as the format is described in ``factors``."""
    of_b, of_a, bits = (int(part) for part in codec.split("-")[1:])
    place, tensors = 0, []

    def bf16(at: int) -> np.float32:
        return np.float32(struct.unpack("<f", b"\0\0" + payload[at : at + 2])[0])

    for index, shape in enumerate(spec.shapes):
        short, long = (shape[0], shape[1]) if index % 2 == 0 else (shape[1], shape[0])
        count = min(of_a if index % 2 == 0 else of_b, short, long)
        blocks = (long + 127) // 128
        scales = [[bf16(place + 2 * (c * blocks + b)) for b in range(blocks)] for c in range(count)]
        place += 2 * count * blocks
        shorts = [[bf16(place + 2 * (c * short + j)) for j in range(short)] for c in range(count)]
        place += 2 * count * short
        place += -place % 16
        tensor = np.zeros((short, long), np.float32)
        for c in range(count):
            for i in range(long):
                if bits == 8:
                    code = struct.unpack_from("<b", payload, place + i)[0]
                else:
                    block, rest = divmod(i, 128)
                    byte = payload[place + 64 * block + rest % 64]
                    code = (byte >> 4 if rest >= 64 else byte & 15) - 8
                for j in range(short):
                    tensor[j, i] += scales[c][i // 128] * np.float32(code) * shorts[c][j]
            place += long if bits == 8 else 64 * blocks
        place += -place % 16
        tensors.append((tensor.T if index % 2 else tensor).reshape(-1))
    assert place == len(payload)
    return np.concatenate(tensors)


def relative(found: FloatArray | Matrix, values: FloatArray | Matrix) -> float:
    return float(np.linalg.norm(found - values) / np.linalg.norm(values))


def error(values: FloatArray, codec: str, spec: GradientSpec = LEARNERS) -> float:
    return relative(decode_gradient(encode_gradient(values, spec, codec), spec), values)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("spec", [SPEC, GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((4, 130), (257, 4), (4, 2)))])
def test_a_record_is_what_its_description_says(codec: str, spec: GradientSpec) -> None:
    record = encode_gradient(random_values(spec), spec, codec)
    assert len(record) == HEADER_BYTES + codec_named(codec).max_payload_bytes(spec) <= max_record_bytes(spec)
    found = decode_gradient(record, spec)
    assert found.any()
    np.testing.assert_array_equal(found, read_slowly(record[HEADER_BYTES:], codec, spec))


@pytest.mark.parametrize("codec", CODECS)
def test_the_form_gives_the_places_of_all_parts(codec: str) -> None:
    """A payload is taken apart by the form alone and multiplied in matrices."""
    form = factor_form(codec, LEARNERS.shapes)
    record = encode_gradient(random_values(LEARNERS), LEARNERS, codec)
    payload = np.frombuffer(record, np.uint8, offset=HEADER_BYTES)
    assert form.payload_bytes == len(payload) and form.bits == int(codec[-1])
    assert form.table.dtype == np.int64 and form.table.shape == (8, 7) and not form.table.flags.writeable
    assert not (form.table[:, [SCALES, CODES]] % 16).any() and form.payload_bytes % 16 == 0
    for row, tensor in zip(form.table, tensors_of(decode_gradient(record, LEARNERS), LEARNERS), strict=True):
        count, long, short = row[COUNT], row[LONG], row[SHORT]
        assert tensor.shape == (short, long)
        blocks = -(-long // 128)
        halves = [
            payload[row[place] :][: 2 * count * size].view("<u2") for place, size in ((SCALES, blocks), (SHORTS, short))
        ]
        scales, shorts = ((each.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for each in halves)
        stored = payload[row[CODES] :][: count * row[STRIDE]].reshape(count, row[STRIDE])
        if form.bits == 8:
            codes = stored.view(np.int8)
        else:
            pairs = stored.reshape(count, blocks, 64)
            codes = (
                np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(count, blocks * 128)[:, :long].astype(np.int8)
                - 8
            )
        values = codes * np.repeat(scales.reshape(count, blocks), 128, axis=1)[:, :long]
        np.testing.assert_allclose(shorts.reshape(count, short).T @ values, tensor, atol=1e-5)


def test_the_rank_is_the_short_side_and_a_count_is_no_more_than_the_smaller_side() -> None:
    table = factor_form("factors-4-1-8", LEARNERS.shapes).table
    assert table[:, SHORT].tolist() == [16] * 8
    assert table[:, LONG].tolist() == [576, 1536, 200, 130, 3, 5, 1, 1]
    assert table[:, COUNT].tolist() == [1, 4, 1, 4, 1, 4, 1, 1]
    assert factor_form("factors-16-16-8", LEARNERS.shapes).table[:, COUNT].tolist() == [16, 16, 16, 16, 3, 5, 1, 1]
    assert factor_form("factors-16-0-8", LEARNERS.shapes).table[:, COUNT].tolist() == [0, 16, 0, 16, 0, 5, 0, 1]


def test_names_beyond_the_rank_share_one_form_and_the_memory_to_check_it() -> None:
    names = [f"factors-{number}-{number}-4" for number in range(20, 60)]
    record = encode_gradient(of_rank(1), LEARNERS, "factors-16-16-4")
    assert {id(factor_form(name, LEARNERS.shapes)) for name in names} == {
        id(factor_form("factors-16-16-4", LEARNERS.shapes))
    }
    tracemalloc.start()
    try:
        for name in names:
            codec_named(name).check(memoryview(record)[HEADER_BYTES:], LEARNERS)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 * len(record), "seven bytes for each byte of one payload"


@pytest.mark.parametrize("codec", CODECS)
def test_all_documents_of_a_codec_have_one_size(codec: str) -> None:
    gradients = (of_rank(1), random_values(LEARNERS), np.zeros(LEARNERS.num_values, np.float32))
    assert len({len(encode_gradient(values, LEARNERS, codec)) for values in gradients}) == 1


@pytest.mark.parametrize("codec", CODECS)
def test_equal_values_give_equal_bytes(codec: str) -> None:
    values = of_rank(5, noise=0.1)
    record = encode_gradient(values, LEARNERS, codec)
    assert encode_gradient(values.copy(), LEARNERS, codec) == record
    assert encode_gradient(of_rank(5, noise=0.1, seed=1), LEARNERS, codec) != record


def best_error(values: FloatArray, of_b: int, of_a: int) -> float:
    """The least relative error of any sum of so many products: what numpy's decomposition leaves out."""
    left = total = 0.0
    for index, tensor in enumerate(tensors_of(values, LEARNERS)):
        energies = np.linalg.svd(tensor, compute_uv=False) ** 2
        left += float(energies[of_b if index % 2 else of_a :].sum())
        total += float(energies.sum())
    return (left / total) ** 0.5


@pytest.mark.parametrize(("of_b", "of_a"), [(1, 0), (1, 1), (4, 1), (8, 2)])
@pytest.mark.parametrize(("bits", "rounding"), [(8, 0.008), (4, 0.11)])
def test_the_best_components_are_kept(of_b: int, of_a: int, bits: int, rounding: float) -> None:
    """The squares of both errors add up: what is left out and what is rounded."""
    for values in (of_rank(16, noise=0.2), random_values(LEARNERS)):
        least = best_error(values, of_b, of_a)
        assert 0.05 < least < 1
        assert least <= error(values, f"factors-{of_b}-{of_a}-{bits}") <= (least**2 + rounding**2) ** 0.5


def test_at_full_rank_only_the_rounding_of_numbers_is_left() -> None:
    """Each tensor is off by what a code of 8 bits and a bf16 round, whatever its rank and shape."""
    for values in (random_values(LEARNERS), of_rank(3), of_rank(1, noise=1e-4)):
        found = decode_gradient(encode_gradient(values, LEARNERS, "factors-16-16-8"), LEARNERS)
        for tensor, own in zip(tensors_of(values, LEARNERS), tensors_of(found, LEARNERS), strict=True):
            assert 0 < relative(own, tensor) < 0.01
    assert error(random_values(LEARNERS), "factors-99-99-8") == error(random_values(LEARNERS), "factors-16-16-8")
    assert error(random_values(LEARNERS), "factors-15-15-8") > 0.1


@pytest.mark.parametrize("power", [-100, -40, 40])
def test_the_size_of_a_gradient_has_no_effect_on_its_codes(power: int) -> None:
    values = of_rank(4, noise=0.1)
    form = factor_form("factors-4-1-8", LEARNERS.shapes)
    plain, scaled = (
        np.frombuffer(encode_gradient(each, LEARNERS, "factors-4-1-8"), np.uint8, offset=HEADER_BYTES)
        for each in (values, values * np.float32(2.0**power))
    )
    for row in form.table:
        part = slice(row[CODES], row[CODES] + row[COUNT] * row[STRIDE])
        assert plain[part].any() and np.array_equal(plain[part], scaled[part])


def test_short_vectors_are_fitted_to_what_the_long_ones_became() -> None:
    """No multiple of a decoded tensor would be closer: its error is at right angles to it, but for bf16."""
    values = of_rank(1, noise=0.1)
    found = decode_gradient(encode_gradient(values, LEARNERS, "factors-1-1-4"), LEARNERS)
    for tensor, own in zip(tensors_of(values, LEARNERS)[:4], tensors_of(found, LEARNERS)[:4], strict=True):
        energy = float((own * own).sum())
        assert relative(own, tensor) > 0.05
        assert abs(float((own * (tensor - own)).sum())) < 0.003 * energy


@pytest.mark.parametrize("codec", CODECS)
def test_a_gradient_of_nothing_is_nothing(codec: str) -> None:
    zero = np.zeros(LEARNERS.num_values, np.float32)
    assert not decode_gradient(encode_gradient(zero, LEARNERS, codec), LEARNERS).any()
    one_tensor = zero.copy()
    one_tensor[16 * 576 : 16 * 576 + 1536 * 16] = of_rank(1)[16 * 576 : 16 * 576 + 1536 * 16]
    found = tensors_of(decode_gradient(encode_gradient(one_tensor, LEARNERS, codec), LEARNERS), LEARNERS)
    assert [bool(tensor.any()) for tensor in found] == [False, True] + [False] * 6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=12, max_size=12), st.sampled_from(["8", "4"]))
def test_any_values_below_the_limit_make_a_sound_record(numbers: list[float], bits: str) -> None:
    spec = GradientSpec(SPEC.fingerprint, SPEC.layout_id, ((2, 4), (2, 2)))
    record = encode_gradient(np.array(numbers, np.float32), spec, f"factors-2-2-{bits}")
    verify_record(record, spec)
    assert np.isfinite(decode_gradient(record, spec)).all()


def test_a_diverged_gradient_is_refused() -> None:
    with pytest.raises(GradientFormatError, match=r"values must be at most 2\*\*50 in factors-4-1-8"):
        encode_gradient(np.full(LEARNERS.num_values, 1e19, np.float32), LEARNERS, "factors-4-1-8")


@pytest.mark.parametrize("name", ["factors-1-0-8", "factors-99-99-4", "factors-16-1-8"])
def test_a_codec_is_found_by_its_numbers(name: str) -> None:
    assert is_factors(name) and codec_named(name).name == name
    check_choice(name)


@pytest.mark.parametrize(
    "name",
    ["factors-0-1-8", "factors-4-1-2", "factors-04-1-8", "factors-4-1", "factors-100-1-8", "factors--4-1-8", "int8",
     "factors-4-1-8 ", "factors-4-1-8\n", "factors-٤-1-8", "factors-1٤-1-8"],
)  # fmt: skip
def test_other_names_are_no_factors(name: str) -> None:
    assert not is_factors(name)
    with pytest.raises(GradientFormatError, match="factors-P-Q-BITS"):
        factor_form(name, LEARNERS.shapes)
    if name != "int8":
        with pytest.raises(GradientFormatError, match="factors-P-Q-BITS"):
            codec_named(name)


def corrupt(codec: str, tensor: int, column: int, offset: int, content: bytes) -> bytes:
    """A record with bytes changed after the start of a part, with a right checksum."""
    record = encode_gradient(of_rank(4, noise=0.1), LEARNERS, codec)
    place = HEADER_BYTES + int(factor_form(codec, LEARNERS.shapes).table[tensor, column]) + offset
    assert record[place : place + len(content)] != content
    return resealed(record, {place: content})


@pytest.mark.parametrize(
    ("codec", "tensor", "column", "offset", "content", "message"),
    [
        ("factors-4-1-8", 0, SCALES, 0, b"\x80\x7f", "because a scale is below"),  # infinity
        ("factors-4-1-8", 1, SCALES, 2, b"\xc0\x7f", "because a scale is below"),  # NaN
        ("factors-4-1-8", 1, SCALES, 0, b"\x00\x5b", "because a scale is below"),  # 2**55
        ("factors-4-1-8", 1, SCALES, 0, b"\x00\xbc", "because a scale is below"),  # negative
        ("factors-4-1-8", 1, SCALES, 0, b"\x00\x80", "because a scale is below"),  # another zero
        ("factors-4-1-8", 1, SHORTS, 0, b"\x80\xff", "because a short value is below"),
        ("factors-4-1-8", 3, SHORTS, 126, b"\x00\xdb", "because a short value is below"),  # −2**55, the last one
        ("factors-4-1-8", 1, CODES, 4 * 1536 - 1, b"\x80", "must be a code in -127..127, got 0x80"),
        ("factors-4-1-8", 0, SHORTS, 32, b"\1", "zero, because it is padding"),  # 10 bytes of scales, 32 of shorts
        ("factors-4-1-8", 3, CODES, 4 * 130, b"\1", "zero, because it is padding"),
        ("factors-4-1-4", 1, CODES, 0, b"\x08", "two codes in -7..7, got 0x08"),
        ("factors-4-1-4", 1, CODES, 4 * 768 - 1, b"\x80", "two codes in -7..7, got 0x80"),
        ("factors-4-1-4", 3, CODES, 64, b"\x18", "a code in -7..7 and the code 0"),  # 130 codes: two in the last block
        ("factors-4-1-4", 3, CODES, 65, b"\x80", "a code in -7..7 and the code 0"),
        ("factors-4-1-4", 3, CODES, 66, b"\x00", "two codes 0"),
        ("factors-4-1-4", 3, CODES, 127, b"\x89", "two codes 0"),
        ("factors-4-1-4", 0, SHORTS, 32, b"\1", "zero, because it is padding"),
    ],
)  # fmt: skip
def test_a_payload_that_can_not_be_is_refused_though_the_checksum_is_right(
    codec: str, tensor: int, column: int, offset: int, content: bytes, message: str
) -> None:
    with pytest.raises(GradientFormatError, match=message) as caught:
        verify_record(corrupt(codec, tensor, column, offset, content), LEARNERS)
    place = int(factor_form(codec, LEARNERS.shapes).table[tensor, column]) + offset
    assert int(str(caught.value).split()[1]) in range(place, place + len(content))


@pytest.mark.parametrize("codec", CODECS)
def test_the_greatest_numbers_still_decode_to_finite_values(codec: str) -> None:
    record = encode_gradient(of_rank(4, noise=0.1), LEARNERS, codec)
    changes = {}
    for count, long, short, scales, shorts, codes, stride in factor_form(codec, LEARNERS.shapes).table.tolist():
        greatest = b"\xff\x5a"
        changes[HEADER_BYTES + scales] = greatest * (count * -(-long // 128))
        changes[HEADER_BYTES + shorts] = greatest * (count * short)
        if codec.endswith("8"):
            changes[HEADER_BYTES + codes] = b"\x7f" * (count * stride)
    values = decode_gradient(resealed(record, changes), LEARNERS)
    assert np.isfinite(values).all() and np.abs(values).max() > 2.0**109


@pytest.mark.parametrize("change", [-1, 1, 16])
def test_a_payload_of_another_size_is_refused(change: int) -> None:
    payload = encode_gradient(of_rank(1), LEARNERS, "factors-4-1-8")[HEADER_BYTES:]
    other = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(GradientFormatError, match=f"payload must be {len(payload)} bytes"):
        codec_named("factors-4-1-8").check(memoryview(other), LEARNERS)
