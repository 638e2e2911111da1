"""LoRA in linear layers on a GPU: the Triton kernels against sums in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

INPUTS, RANK, SLOTS = 200, 4, 5


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """The module, with its kernels for Triton's interpreter where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module("regrad_vllm.adapt.triton_lora")
        yield importlib.reload(module)
    importlib.reload(module)


def added(
    kernels: Any, slots: Sequence[int], outputs: Sequence[int], dtype: torch.dtype, rank: int = RANK,
    earlier: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y before, y after, what float64 gives) for a batch; ``earlier``: slots of the batch in whose place it comes."""
    make = torch.Generator().manual_seed(len(slots))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    a = [normal(SLOTS, 1, rank, INPUTS) for _ in outputs]
    b = [normal(SLOTS, 1, width, rank) for width in outputs]
    x, y = normal(len(slots), INPUTS), normal(len(slots), sum(outputs))
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            low = [(of_a[slot, 0].double() @ x[row].double()).to(dtype).double() for of_a in a]
            expected[row] += torch.cat([of_b[slot, 0].double() @ part for of_b, part in zip(b, low, strict=True)])
    tiles = kernels.Tiles(80, SLOTS, torch.device(DEVICE))
    if earlier is not None:
        tiles.update(np.array(earlier, np.int64))
    tiles.update(np.array(slots, np.int64))
    there = y.clone().to(DEVICE)
    kernels.LAYERS.clear()  # addresses are used again
    kernels.add_lora(
        there, x.to(DEVICE), [s.to(DEVICE) for s in a], [s.to(DEVICE) for s in b], outputs, tiles.table, tiles.order,
        tiles.is_empty, tiles.max_tiles(len(slots)),
    )  # fmt: skip
    return y, there.cpu(), expected


MIXED = [3, -1, 0, 3, 1, -1, 4, 0, 3]
BATCHES = [[2], [-1, 4], MIXED, [1] * 40, [0] * 17 + [-1] * 5 + [2] * 16 + [0] * 3, list(range(SLOTS)), [-1, -1]]


@pytest.mark.parametrize("slots", BATCHES, ids=lambda slots: f"{len(slots)} rows")
@pytest.mark.parametrize("outputs", [(72,), (300, 300), (520, 40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_gets_its_own_adapter_and_rows_without_one_are_untouched(
    kernels: Any, slots: list[int], outputs: tuple[int, ...], dtype: torch.dtype
) -> None:
    before, after, expected = added(kernels, slots, outputs, dtype)
    bare = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(after[bare], before[bare])
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert torch.allclose(after.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    if len(bare) < len(slots):
        assert (after != before).any(), "else this test shows nothing"


@pytest.mark.parametrize("rank", [1, 16, 24, 64])
def test_ranks_that_are_no_power_of_two_and_inputs_that_fill_no_block(kernels: Any, rank: int) -> None:
    _, after, expected = added(kernels, MIXED, (72, 40), torch.float32, rank)
    assert torch.allclose(after.double(), expected, rtol=1e-5, atol=1e-4)


def test_nothing_is_left_of_the_step_before(kernels: Any) -> None:
    _, after, expected = added(kernels, [4, -1], (72,), torch.float32, earlier=[0, 1, 2, 3, 4] * 16)
    assert torch.allclose(after.double(), expected, rtol=1e-5, atol=1e-4)


def stacks(outputs: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    shapes = (SLOTS, 1, RANK, INPUTS), (SLOTS, 1, outputs, RANK)
    a, b = (torch.randn(shape, generator=make).to(DEVICE, dtype) for shape in shapes)
    return a, b


@pytest.mark.parametrize(("slots", "num_rows"), [([1, -1, 1], 32), ([0, 1, 2, 3, 4] * 8, 3), ([4] * 40, 20)])
def test_a_layer_with_more_or_fewer_rows_than_the_batch_has_no_others_touched(
    kernels: Any, slots: list[int], num_rows: int
) -> None:
    """A captured step has rows of padding behind the batch's."""
    tiles = kernels.Tiles(80, SLOTS, torch.device(DEVICE))
    tiles.update(np.array(slots, np.int64))
    a, b = stacks(72)
    x, guarded = torch.ones(num_rows, INPUTS, device=DEVICE), torch.zeros(100, 72, device=DEVICE)
    y = guarded[:num_rows]
    kernels.LAYERS.clear()
    kernels.add_lora(y, x, [a], [b], [72], tiles.table, tiles.order, tiles.is_empty, tiles.max_tiles(num_rows))
    for row in range(100):
        slot = slots[row] if row < min(len(slots), num_rows) else -1
        expected = b[slot, 0] @ (a[slot, 0] @ x[0]) if slot >= 0 else torch.zeros(72, device=DEVICE)
        assert torch.allclose(guarded[row], expected, rtol=1e-4, atol=1e-4), row


def test_a_graph_that_is_replayed_for_a_batch_without_adapters_changes_nothing(kernels: Any) -> None:
    tiles = kernels.Tiles(80, SLOTS, torch.device(DEVICE))
    tiles.update(np.array([0, 1], np.int64))
    tiles.update(np.array([-1, -1], np.int64))
    assert tiles.is_empty.item()
    a, b = stacks(72)
    y = torch.zeros(2, 72, device=DEVICE)
    never = torch.zeros(1, dtype=torch.bool)
    kernels.LAYERS.clear()
    kernels.add_lora(
        y, torch.ones(2, INPUTS, device=DEVICE), [a], [b], [72], tiles.table, tiles.order, never, tiles.max_tiles(2)
    )
    assert not y.any()


def test_a_layer_of_another_form_is_refused(kernels: Any) -> None:
    tiles = kernels.Tiles(80, SLOTS, torch.device(DEVICE))
    tiles.update(np.array([0], np.int64))
    a, b = stacks(72)
    for x, y in (
        (torch.ones(1, INPUTS - 1), torch.ones(1, 72)), (torch.ones(1, INPUTS), torch.ones(1, 71)),
        (torch.ones(1, INPUTS), torch.ones(2, 72)), (torch.ones(INPUTS, 2).T[:1], torch.ones(1, 72)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="x and y must be"):
            kernels.add_lora(y.to(DEVICE), x.to(DEVICE), [a], [b], [72], tiles.table, tiles.order, tiles.is_empty, 1)


def test_the_table_has_a_tile_for_each_slot_and_none_behind(kernels: Any) -> None:
    tiles = kernels.Tiles(80, SLOTS, torch.device(DEVICE))
    tiles.update(np.array([1, -1, 1], np.int64))
    table = tiles.table.cpu()
    assert table[0].tolist() == [1, 1, 2] and (table[1:] == -1).all() and tiles.order[:3].tolist() == [1, 0, 2]
    assert [tiles.max_tiles(rows) for rows in (1, 3, 16, 80)] == [1, 3, 6, 10]


@pytest.mark.parametrize("seed", range(20))
def test_no_batch_has_more_tiles_than_are_launched(kernels: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    tiles = kernels.Tiles(400, SLOTS, torch.device(DEVICE))
    slots = random.integers(-1, SLOTS, random.integers(1, 401))
    tiles.update(slots)
    used = tiles.table.cpu().numpy()
    used = used[used[:, 0] >= 0]
    assert len(used) <= tiles.max_tiles(len(slots))
    order = tiles.order.cpu().numpy()
    rows = {(int(row), slot) for slot, first, count in used.tolist() for row in order[first : first + count]}
    assert rows == {(row, slot) for row, slot in enumerate(slots.tolist()) if slot >= 0}


def test_a_batch_that_is_too_large_is_refused(kernels: Any) -> None:
    tiles = kernels.Tiles(4, 2, torch.device(DEVICE))
    with pytest.raises(ValueError, match="2 adapters and 4 rows at most, got 3 and 3"):
        tiles.update(np.array([0, 1, 2], np.int64))
    with pytest.raises(ValueError, match="got 1 and 5"):
        tiles.update(np.zeros(5, np.int64))
