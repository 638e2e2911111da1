"""The CPU kernels against dense adapters in float64: types, ranks, shards, codecs, many rows, many threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from regrad_vllm.serve.kernels.batch import GROUP_ROWS, Forms
from regrad_vllm.serve.kernels.layer import DocumentsLayer
from regrad_vllm.serve.kernels.layer_slice import MAX_RANK, LayerSlice
from tests.serve.kernels.made import Case, Uses

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value. A rounded value is off by half of its last bit.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows + width)).to(dtype)


def check(case: Case, uses: Uses, *, dtype: torch.dtype = torch.float32, gap: int = 1, **shard: object) -> Tensor:
    """Adds to a batch in which ReGrad's rows stand between others. Returns y."""
    forms = Forms(case.layout.shapes)
    layer = case.layer(forms, **shard)  # type: ignore[arg-type]
    rows = [1 + gap * number for number in range(len(uses))]
    num_rows = rows[-1] + 2
    ins, outs = shard.get("ins"), shard.get("outs")
    assert ins is None or isinstance(ins, range)
    assert outs is None or isinstance(outs, range)
    x = drawn(num_rows, len(ins) if ins else case.inputs, dtype)
    y = drawn(num_rows, len(outs) * len(case.outputs) if outs else sum(case.outputs), dtype)
    before = y.clone()
    layer.add(y, x, case.batch(forms, rows, uses, num_rows))
    right = case.expected(before, x, rows, uses, **shard)  # type: ignore[arg-type]
    assert float((right - before).abs().max()) > 1, "the documents matter"
    assert float((y.double() - right).abs().max()) < TOLERANCE[dtype] * float(right.abs().max())
    others = torch.ones(num_rows, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(y[others], before[others]), "bit for bit"
    return y


def mixed(num_rows: int, num_documents: int, seed: int = 0) -> Uses:
    """Rows with 0 to 3 documents, no two with the same."""
    rng = np.random.default_rng(seed)
    return [
        [(int(rng.integers(num_documents)), float(rng.normal())) for _ in range(number % 4)]
        for number in range(num_rows)
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", ["factors-4-1-8", "factors-4-1-4", "factors-2-0-8", "factors-3-5-4"])
@pytest.mark.parametrize("gap", [1, 3])
def test_each_row_gets_its_own_documents_and_other_rows_keep_their_bits(
    dtype: torch.dtype, codec: str, gap: int
) -> None:
    check(Case(16, 300, (200, 130), (codec,) * 5), mixed(17, 5), dtype=dtype, gap=gap)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", ["factors-4-1-8", "factors-3-2-4"])
@pytest.mark.parametrize("num_rows", [GROUP_ROWS - 1, 3 * GROUP_ROWS])
def test_rows_with_the_same_documents_get_the_same_answer_as_alone(
    num_rows: int, dtype: torch.dtype, codec: str
) -> None:
    case = Case(16, 300, (200, 130), (codec,) * 3)
    forms = Forms(case.layout.shapes)
    layer = case.layer(forms)
    own: Uses = [[(0, 0.4), (2, -1.1)]]
    x, before = drawn(num_rows, 300, dtype), drawn(num_rows, 330, dtype)
    together, alone = before.clone(), before.clone()
    layer.add(together, x, case.batch(forms, list(range(num_rows)), own * num_rows, num_rows))
    for row in range(num_rows):
        layer.add(alone[row : row + 1], x[row : row + 1], case.batch(forms, [0], own, 1))
    assert (together - before).abs().amax(1).min() > 1, "the documents matter in each row"
    # Both are rounded, so they may be two errors apart.
    assert float((together - alone).abs().max()) < 2 * TOLERANCE[dtype] * float(alone.abs().max())


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 40, MAX_RANK])
@pytest.mark.parametrize("codec", ["factors-4-1-8", "factors-2-1-4"])
@pytest.mark.parametrize("grouped", [False, True])
def test_any_rank(rank: int, codec: str, grouped: bool) -> None:
    case = Case(rank, 40, (50,), (codec,) * 3)
    check(case, [[(1, 0.7), (2, 0.1)]] * (GROUP_ROWS + 1) if grouped else mixed(9, 3))


@pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 200, 256, 300, 640])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_any_width_of_inputs_and_outputs(size: int, bits: int, grouped: bool) -> None:
    for case in (
        Case(4, size, (70,), (f"factors-2-1-{bits}",) * 2),
        Case(4, 70, (size,), (f"factors-2-1-{bits}",) * 2),
    ):
        check(case, [[(1, 0.7), (0, -0.6)]] * (GROUP_ROWS + 1) if grouped else [[(0, 0.7)], [(1, -2.0), (0, 1.0)]])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "shard",
    [
        {"ins": range(0, 150)}, {"ins": range(150, 300)}, {"ins": range(128, 256)}, {"ins": range(290, 300)},
        {"ins": range(77, 78)}, {"outs": range(0, 100)}, {"outs": range(100, 200)}, {"outs": range(128, 200)},
        {"outs": range(33, 171)}, {"outs": range(199, 200)}, {"ins": range(75, 150), "outs": range(50, 100)},
    ],
)  # fmt: skip
def test_a_worker_reads_its_own_part_of_the_codes(shard: dict[str, range], bits: int, grouped: bool) -> None:
    case = Case(8, 300, (200, 200), (f"factors-3-2-{bits}",) * 4)
    check(case, [[(1, 0.7), (2, 0.1)]] * (GROUP_ROWS + 1) if grouped else mixed(6, 4), **shard)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("parts", [{"with_a": False}, {"with_b": False}, {"with_a": False, "with_b": False}])
def test_documents_may_have_no_part_where_phi_has_one(parts: dict[str, bool], grouped: bool) -> None:
    case = Case(8, 150, (140, 60), ("factors-3-2-8",) * 3)
    uses = [[(1, 0.7), (2, 0.1)]] * (GROUP_ROWS + 1) if grouped else mixed(6, 3)
    check(case, uses, **parts)
    check(case, uses, ins=range(30, 100), outs=range(20, 50), **parts)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_batch_may_mix_codecs(grouped: bool) -> None:
    case = Case(16, 300, (200,), ("factors-4-1-8", "factors-4-1-4", "factors-2-0-4", "factors-9-3-8"))
    uses: Uses = [[(0, 0.5), (1, 0.7), (2, -0.4), (3, 1.0)]]
    check(case, uses * (GROUP_ROWS + 3) if grouped else [*uses, *mixed(12, 4)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_sixteen_documents_a_row(dtype: torch.dtype) -> None:
    case = Case(16, 200, (300,), ("factors-4-1-8", "factors-4-1-4") * 8)
    check(case, [[(document, 0.1 + row) for document in range(16)] for row in range(3)], dtype=dtype)


def test_256_rows_with_16_documents_each() -> None:
    case = Case(16, 130, (140,), ("factors-4-1-8",) * 32)
    rng = np.random.default_rng(3)
    check(case, [[(int(k), float(rng.normal())) for k in rng.choice(32, 16, replace=False)] for _ in range(256)])


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5, 16, 64])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 40])
def test_any_number_of_threads_gives_the_same_bits(num_threads: int, num_rows: int) -> None:
    case = Case(16, 300, (700, 130), ("factors-4-1-8",) * 3)
    results = []
    for number in (1, num_threads):
        torch.set_num_threads(number)
        results += [check(case, mixed(num_rows, 3, 1)), check(case, [[(0, 0.5)]] * (num_rows + GROUP_ROWS))]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_decoding_rows_that_share_documents_are_one_group_though_others_stand_between() -> None:
    case = Case(16, 130, (140,), ("factors-4-1-8",) * 3)
    uses: Uses = [[(row % 3, 0.5)] for row in range(3 * GROUP_ROWS)]
    forms = Forms(case.layout.shapes)
    groups, others = case.batch(forms, list(range(len(uses))), uses, len(uses)).grouped
    assert [group.tolist() for group in groups] == [list(range(start, len(uses), 3)) for start in range(3)]
    assert not len(others)
    check(case, uses)
    uses[5] = [(0, 0.5), (1, 0.5)]
    groups, others = case.batch(forms, list(range(len(uses))), uses, len(uses)).grouped
    assert len(groups) == 2
    check(case, uses)


def test_x_and_y_may_be_parts_of_wider_rows() -> None:
    case = Case(16, 130, (140,), ("factors-4-1-8",) * 3)
    forms = Forms(case.layout.shapes)
    layer = case.layer(forms)
    wide_x, wide_y = drawn(20, 200), drawn(20, 333)
    x, y, before = wide_x[::2, 40:170], wide_y[::2, 100:240], wide_y.clone()
    uses, rows = mixed(8, 3), list(range(1, 9))
    layer.add(y, x, case.batch(forms, rows, uses, 10))
    right = case.expected(before[::2, 100:240], x, rows, uses)
    assert float((y.double() - right).abs().max()) < TOLERANCE[torch.float32] * float(right.abs().max())
    wide_y[::2, 100:240] = before[::2, 100:240]
    assert torch.equal(wide_y, before), "nothing else is written"


def test_a_slice_without_the_learner_stays_as_it_is() -> None:
    case = Case(8, 60, (50, 40), ("factors-2-1-8",) * 2)
    forms = Forms(case.layout.shapes)
    a, b = case.tensors(case.phi, 1)
    layer = DocumentsLayer([LayerSlice(30), LayerSlice(40, a, b, 4, 5, 0, 0)], 1.5, forms)
    x, y = drawn(3, 60), drawn(3, 70)
    before = y.clone()
    uses: Uses = [[(0, 0.5)], [(1, 0.5)]]
    layer.add(y, x, case.batch(forms, [0, 2], uses, 3))
    right = case.expected(torch.zeros(3, 90), x, [0, 2], uses)[:, 50:] + before[:, 30:]
    assert torch.allclose(y[:, 30:].double(), right, atol=1e-4)
    assert torch.equal(y[:, :30], before[:, :30])
    without = DocumentsLayer([LayerSlice(70)], 1.5, forms)
    without.add(y, x, case.batch(forms, [0, 2], uses, 3))
    assert torch.equal(y[:, :30], before[:, :30])


def test_a_batch_without_regrad_rows_changes_nothing() -> None:
    case = Case(8, 60, (50,), ("factors-2-1-8",))
    forms = Forms(case.layout.shapes)
    y = drawn(4, 50)
    before = y.clone()
    case.layer(forms).add(y, drawn(4, 60), case.batch(forms, [], [], 4))
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_phi_may_be_of_a_type_of_two_bytes(dtype: torch.dtype) -> None:
    case = Case(16, 300, (200,), ("factors-4-1-8",) * 3)
    forms = Forms(case.layout.shapes)
    x = drawn(3, 300)
    results = []
    for of_phi in (torch.float32, dtype):
        y = torch.zeros(3, 200)
        case.layer(forms, dtype=of_phi).add(y, x, case.batch(forms, [0, 1, 2], mixed(3, 3), 3))
        results.append(y)
    assert not torch.equal(*results)
    assert float((results[0] - results[1]).abs().max() / results[0].abs().max()) < 2e-2


def test_infinity_and_nan_reach_their_own_row_alone() -> None:
    case = Case(16, 300, (200,), ("factors-4-1-8",) * 3)
    forms = Forms(case.layout.shapes)
    x, y = drawn(4, 300), drawn(4, 200)
    x[1, 7], x[2, 290] = float("inf"), float("nan")
    case.layer(forms).add(y, x, case.batch(forms, [0, 1, 2, 3], [[(0, 0.5)]] * 4, 4))
    assert torch.isfinite(y[[0, 3]]).all()
    assert not torch.isfinite(y[[1, 2]]).any()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(3, 60), torch.zeros(4, 50)),
        (torch.zeros(4, 61), torch.zeros(4, 50)),
        (torch.zeros(4, 60), torch.zeros(4, 51)),
        (torch.zeros(4, 60), torch.zeros(4, 50).bfloat16()),
        (torch.zeros(4, 60).double(), torch.zeros(4, 50).double()),
        (torch.zeros(60, 4).T, torch.zeros(4, 50)),
        (torch.zeros(4, 60), torch.zeros(4, 100)[:, ::2]),
    ],
)
def test_other_shapes_and_types_are_refused(x: Tensor, y: Tensor) -> None:
    case = Case(8, 60, (50,), ("factors-2-1-8",))
    forms = Forms(case.layout.shapes)
    with pytest.raises(ValueError, match="must be contiguous rows of 60 and 50 values"):
        case.layer(forms).add(y, x, case.batch(forms, [0], [[(0, 1.0)]], 4))


def test_slices_that_do_not_fit_are_refused() -> None:
    forms = Forms(((4, 8), (6, 4), (4, 8), (6, 4)))
    a, b = torch.zeros(4, 8), torch.zeros(6, 4)
    with pytest.raises(ValueError, match="must be .R, inputs."):
        LayerSlice(6, a, b.T.contiguous(), 0, 1, 0, 0)
    with pytest.raises(ValueError, match="must have both a and b"):
        LayerSlice(6, None, None, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="must begin at 0 or later"):
        LayerSlice(6, a, b, 0, 1, 0, -5)
    with pytest.raises(ValueError, match="the same inputs"):
        DocumentsLayer([LayerSlice(6, a, b, 0, 1, 0, 0), LayerSlice(6, torch.zeros(4, 7), b, 2, 3, 0, 0)], 1.0, forms)
    with pytest.raises(ValueError, match="the same first input"):
        DocumentsLayer([LayerSlice(6, a, b, 0, 1, 0, 0), LayerSlice(6, a, b, 2, 3, 8, 0)], 1.0, forms)
