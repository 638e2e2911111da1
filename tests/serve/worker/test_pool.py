"""A worker's pool: what it keeps, what it drops, and what happens when it is full. The device is the test's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from regrad_vllm.adapt.arena import ArenaError
from regrad_vllm.serve.worker.device import Resident
from regrad_vllm.serve.worker.pool import Pool, PoolFull

if TYPE_CHECKING:
    from regrad_vllm.serve.kernels.batch import BatchDocuments

ARENAS = ("first", "second")


class Device:
    """Documents of ten bytes each. The first arena has those of digits, the second those of letters."""

    refusal = ""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.forgotten: list[object] = []

    def load(self, arena: str, digest: str) -> Resident:
        if digest == "lost" or (arena == "first") != digest.isdigit():
            raise ArenaError(f"{arena} has no {digest}")
        self.loaded.append(digest)
        return Resident(len(self.loaded), 0, 10, digest)

    def forget(self, resident: Resident) -> None:
        self.forgotten.append(resident.memory)

    def set_batch(self, batch: BatchDocuments | None) -> None:
        raise AssertionError("a pool sets no batch")


def held(pool: Pool, digests: Sequence[str]) -> list[object]:
    return [resident.memory for resident in pool.hold(ARENAS, digests)]


def test_documents_are_loaded_once_from_the_arena_that_has_them() -> None:
    device = Device()
    pool = Pool(device, 100)
    assert held(pool, ["1", "a", "1"]) == ["1", "a", "1"] and not pool.holds_all(["1", "2"])
    assert held(pool, ["a"]) == ["a"] and device.loaded == ["1", "a"] and pool.holds_all(["1", "a"])
    figures = pool.figures()
    assert (figures.num_documents, figures.num_pinned, figures.used_bytes) == (2, 2, 20)
    assert (figures.num_hits, figures.num_misses) == (2, 2)


def test_the_document_that_was_used_longest_ago_goes_first_and_a_held_one_never() -> None:
    device = Device()
    pool = Pool(device, 30)
    held(pool, ["1"])
    for digest in ("2", "3", "2", "4"):
        pool.let_go([digest] if held(pool, [digest]) else [])
    assert device.forgotten == ["3"] and pool.holds_all(["1", "2", "4"])
    pool.let_go(["1"])
    held(pool, ["5"])
    assert device.forgotten == ["3", "1"] and pool.figures().num_evictions == 2


def test_a_full_pool_refuses_and_keeps_nothing_of_the_refused_request() -> None:
    device = Device()
    pool = Pool(device, 20)
    held(pool, ["1"])
    with pytest.raises(PoolFull, match="must have 10 bytes free .* raise --regrad-worker-bytes"):
        held(pool, ["2", "3"])
    assert pool.figures().num_pinned == 1 and device.forgotten == ["3"]
    assert held(pool, ["4"]) == ["4"] and device.forgotten == ["3", "2"]


def test_a_missing_document_lets_go_of_the_others() -> None:
    pool = Pool(Device(), 100)
    with pytest.raises(ArenaError, match="second has no lost"):
        held(pool, ["1", "lost", "2"])
    assert pool.figures().num_pinned == 0
    with pytest.raises(ArenaError, match="none is known"):
        pool.hold((), ["5"])


def test_a_step_goes_beyond_the_budget_and_the_pool_comes_back_to_it() -> None:
    pool = Pool(Device(), 10)
    held(pool, ["1"])
    assert len(pool.hold(ARENAS, ["2", "3"], in_step=True)) == 2
    assert pool.figures().used_bytes == 30
    pool.let_go(["2", "3"])
    assert pool.figures().used_bytes == 10


def test_a_full_pool_first_asks_for_what_nobody_needs() -> None:
    pool = Pool(Device(), 10)
    held(pool, ["1"])
    pool.on_full = lambda: pool.let_go(["1"])
    assert held(pool, ["2"]) == ["2"]


def test_two_threads_that_load_one_document_share_it() -> None:
    both = threading.Barrier(2)

    class Slow(Device):
        def load(self, arena: str, digest: str) -> Resident:
            resident = super().load(arena, digest)
            both.wait(10)
            return resident

    device = Slow()
    pool = Pool(device, 100)
    found: list[Resident] = []
    threads = [threading.Thread(target=lambda: found.extend(pool.hold(ARENAS, ["1"]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found[0] == found[1] and device.forgotten == ["1"]
    assert pool.figures().used_bytes == 10
    pool.let_go(["1", "1"])
    assert pool.figures().num_pinned == 0
