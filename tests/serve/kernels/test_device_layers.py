"""φ* and documents in a layer on a GPU, against composed adapters in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from regrad_vllm.serve.kernels.layer_slice import LayerSlice
from tests.serve.kernels.device import DEVICE, Case, Request, kernels

__all__ = ["kernels"]

FEW: list[Request] = [(1, [0]), None, (1, [1, 0]), (1, [])]
MANY: list[Request] = [(1, [k % 3, (k + 1) % 3]) if k % 4 else None for k in range(18)]
SEGMENTS: list[Request] = [(18, [0, 2]), None, (1, [1]), (4, [])]
SHAPES = {"few rows": FEW, "tiles": MANY, "prefill": SEGMENTS}
REQUESTS = {"few rows": 4, "tiles": 20, "prefill": 4}  # with more rows than requests, rows are computed as prompts
CODECS = ["factors-4-1-8", "factors-3-2-4", "factors-2-0-8"]


def check(before: torch.Tensor, after: torch.Tensor, expected: torch.Tensor, requests: Sequence[Request]) -> None:
    """Each ReGrad row is right to its type's precision; all others have the bits that they had."""
    is_base = torch.ones(len(after), dtype=torch.bool)
    row = 0
    for request in requests:
        num_rows = 1 if request is None else request[0]
        is_base[row : row + num_rows] = request is None
        row += num_rows
    assert torch.equal(after[is_base], before[is_base])
    assert not is_base.all() and bool((expected - before.double())[~is_base].abs().mean(1).min() > 0.2), "no test else"
    tolerance = 2e-5 if after.dtype == torch.float32 else 2 * torch.finfo(after.dtype).eps
    sizes = expected.abs().clamp(min=expected.abs().mean())
    assert float(((after.double() - expected).abs() / sizes)[~is_base].max()) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_gets_its_own_documents(kernels: Any, shape: str, dtype: torch.dtype) -> None:
    case = Case(16, 256, (256, 128), CODECS, dtype, max_requests=REQUESTS[shape])
    check(*case.run(kernels, SHAPES[shape], padding=0 if shape == "few rows" else 2), SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("programs", [1, 100])
def test_the_inputs_are_split_as_far_as_that_fills_the_device(
    kernels: Any, shape: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    case = Case(16, 384, (256,), CODECS, max_requests=REQUESTS[shape])
    check(*case.run(kernels, SHAPES[shape]), SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs,outputs", [(200, (136,)), (100, (70, 30))])
def test_a_layer_that_fills_no_blocks(kernels: Any, shape: str, inputs: int, outputs: tuple[int, ...]) -> None:
    case = Case(16, inputs, outputs, CODECS, torch.bfloat16, max_requests=REQUESTS[shape])
    check(*case.run(kernels, SHAPES[shape]), SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [5, 64, 160])
def test_other_ranks(kernels: Any, shape: str, rank: int) -> None:
    case = Case(rank, 128, (128,), CODECS, max_requests=REQUESTS[shape])
    check(*case.run(kernels, SHAPES[shape]), SHAPES[shape])


def test_a_row_has_any_number_of_documents(kernels: Any) -> None:
    case = Case(16, 128, (128,), [CODECS[k % 3] for k in range(16)], weights=[0.1 + 0.02 * k for k in range(16)])
    requests: list[Request] = [(1, list(range(number))) for number in range(17)]
    check(*case.run(kernels, requests), requests)


def test_256_rows_with_documents_of_their_own(kernels: Any) -> None:
    case = Case(16, 128, (256,), CODECS * 4, max_requests=256, max_documents=512)
    requests: list[Request] = [(1, [k % 12, (5 * k) % 11]) if k % 17 else None for k in range(256)]
    check(*case.run(kernels, requests), requests)


def test_a_prompt_has_more_rows_than_a_tile(kernels: Any) -> None:
    case = Case(128, 128, (128,), CODECS, torch.bfloat16, max_requests=4)
    requests: list[Request] = [(70, [1, 0]), None, (40, [1, 0]), (2, [2])]
    check(*case.run(kernels, requests), requests)


def test_more_components_than_one_product_has(kernels: Any) -> None:
    case = Case(40, 128, (128,), ["factors-19-17-8", "factors-2-18-4"], max_requests=3)
    for requests in [(1, [0]), (1, [1, 0])], [(18, [0, 1]), (3, [1])]:
        check(*case.run(kernels, requests), requests)


@pytest.mark.parametrize("shape", ["tiles", "prefill"])
@pytest.mark.parametrize(
    "shard", [(slice(0, 256), (slice(128, 256), slice(64, 128))), (slice(96, 200), (slice(70, 201), slice(1, 127)))]
)
def test_a_worker_computes_with_its_part_of_a_tensor(kernels: Any, shape: str, shard: Any) -> None:
    """Tensor parallel cuts the outputs, or the inputs. It needn't cut between blocks of codes."""
    case = Case(16, 256, (256, 128), CODECS, shard=shard, max_requests=REQUESTS[shape])
    check(*case.run(kernels, SHAPES[shape]), SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_without_phi_or_without_documents(kernels: Any, shape: str) -> None:
    case = Case(16, 128, (128, 128, 256), CODECS, without=[1], phi_only=[0], max_requests=REQUESTS[shape])
    before, after, expected = case.run(kernels, SHAPES[shape])
    check(before, after, expected, SHAPES[shape])
    assert torch.equal(after[:, 128:256], before[:, 128:256])


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_batches_give_equal_bits(kernels: Any, shape: str) -> None:
    case = Case(16, 256, (128,), CODECS, max_requests=REQUESTS[shape])
    tables = case.tables(kernels)
    layer = case.layer(kernels, tables)
    tables.write(case.batch(SHAPES[shape]))
    x, y = (
        tensor.to(DEVICE) for tensor in case.inputs_of(sum(request[0] if request else 1 for request in SHAPES[shape]))
    )
    first, second = y.clone(), y.clone()
    layer.add(first, x)
    layer.add(second, x)
    assert torch.equal(first, second) and not torch.equal(first, y)


def test_a_graph_replays_whatever_the_tables_say(kernels: Any) -> None:
    """A captured step has the tables' addresses: the step that it runs may have other documents, or none."""
    case = Case(16, 128, (128,), CODECS)
    tables = case.tables(kernels)
    layer = case.layer(kernels, tables)
    x, y = case.inputs_of(4)
    for requests in FEW, [(1, [2]), (1, [0, 1]), None, None], [None] * 4, FEW:
        batch = case.batch(requests)
        tables.write(batch if len(batch.rows) else None)
        after = y.clone().to(tables.rows.device)
        layer.add(after, x.to(after.device))
        if any(requests):
            check(y, after.cpu(), case.expected(x, y, requests), requests)
        else:
            assert torch.equal(after.cpu(), y)


def test_rows_of_other_widths_are_refused(kernels: Any) -> None:
    case = Case(16, 128, (128,), CODECS[:1])
    layer = case.layer(kernels, case.tables(kernels))
    x, y = case.inputs_of(3)
    for wrong_x, wrong_y in ((x[:, 1:], y), (x, y[1:]), (x, y[:, 1:]), (x.T[:3, :3], y)):
        with pytest.raises(ValueError, match=r"x and y must be \(\(3, 128\), \(3, 128\)\)|x and y must be"):
            layer.add(wrong_y, wrong_x)
    layer.add(y[:0], x[:0])
    with pytest.raises(ValueError, match="a step must have 600 rows at most, got 601"):
        layer.add(y[:1].expand(601, -1), x[:1].expand(601, -1))


def test_slices_of_another_rank_are_refused(kernels: Any) -> None:
    case = Case(16, 128, (128,), CODECS[:1])
    slices = [LayerSlice(8, torch.zeros(rank, 8), torch.zeros(8, rank)) for rank in (16, 15)]
    with pytest.raises(ValueError, match=r"φ\* must be \(16, 8\) and \(8, 16\), got \(15, 8\) and \(8, 15\)"):
        kernels.DeviceLayer(slices, 1.0, case.tables(kernels), torch.float32)
