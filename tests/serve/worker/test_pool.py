"""A worker's pool: what it keeps, what it drops, and what happens when it is full. The device is the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from regrad_vllm.serve.arena.record_files import ArenaError
from regrad_vllm.serve.worker.device import NoMemory, Resident
from regrad_vllm.serve.worker.pool import Pool, PoolFull

if TYPE_CHECKING:
    from regrad_vllm.serve.kernels.batch import BatchDocuments

ARENAS = ("first", "second")


class Device:
    """Documents of ten bytes each. The first arena has those of digits, the second those of letters."""

    refusal = ""

    def __init__(self, max_documents: int = 10**9, room: int = 10**9) -> None:
        self.max_documents = max_documents
        self._room = room  # documents that there is memory for
        self.loaded: list[str] = []
        self.forgotten: list[object] = []

    def load(self, arena: str, digest: str) -> Resident:
        if digest == "lost" or (arena == "first") != digest.isdigit():
            raise ArenaError(f"{arena} has no {digest}")
        if len(self.loaded) - len(self.forgotten) == self._room:
            raise NoMemory("the device is full; make it larger")
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
    assert (figures.num_documents, figures.num_held, figures.used_bytes) == (2, 2, 20)
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
    assert device.forgotten == ["3", "2"], "a request has used 1 until now"
    assert pool.figures().num_evictions == 2 and pool.figures().num_held == 1


def test_the_time_for_a_document_does_not_grow_with_the_pool() -> None:
    """The least of many times, because the machine does other work meanwhile."""
    least = []
    for size in (100, 20_000):
        pool = Pool(Device(), 10 * size)
        held(pool, [str(number) for number in range(size - 1)])
        times = []
        for number in range(50):
            start = time.perf_counter()
            pool.let_go(["x"] if held(pool, ["x"]) else [])
            pool.let_go(["y"] if held(pool, ["y"]) else [])
            assert pool.figures().num_documents == size and pool.figures().num_evictions == 2 * number + 1
            times.append(time.perf_counter() - start)
        least.append(min(times))
    assert least[1] < 10 * least[0], "both evict one document, beside those that are held"


def test_a_full_pool_refuses_and_keeps_nothing_of_the_refused_request() -> None:
    device = Device()
    pool = Pool(device, 20)
    held(pool, ["1"])
    with pytest.raises(PoolFull, match="must have 10 bytes free .* raise --regrad-worker-bytes"):
        held(pool, ["2", "3"])
    assert pool.figures().num_held == 1 and device.forgotten == ["3"]
    assert held(pool, ["4"]) == ["4"] and device.forgotten == ["3", "2"]


def test_the_number_of_documents_is_bounded_too() -> None:
    device = Device(max_documents=2)
    pool = Pool(device, 100)
    for digest in ("1", "2", "3"):
        pool.let_go([digest] if held(pool, [digest]) else [])
    assert device.forgotten == ["1"]
    held(pool, ["2", "3"])
    with pytest.raises(PoolFull, match="must keep 2 documents at most, .* or raise vm.max_map_count"):
        held(pool, ["4"])
    assert len(pool.hold(ARENAS, ["4"], in_step=True)) == 1


@pytest.mark.parametrize("in_step", [False, True])
def test_a_device_without_memory_gets_back_what_nobody_holds(in_step: bool) -> None:
    device = Device(room=3)
    pool = Pool(device, 1000)
    held(pool, ["1", "2", "3"])
    pool.let_go(["2"])
    pool.on_full = lambda: pool.let_go(["3"])
    pool.hold(ARENAS, ["4"], in_step=in_step)
    assert device.forgotten == (["2"] if in_step else ["2", "3"]), "a step has let go before"
    pool.on_full = lambda: None
    with pytest.raises(PoolFull, match="the device is full; make it larger"):
        pool.hold(ARENAS, ["5", "6"], in_step=in_step)
    assert pool.figures().num_held == (3 if in_step else 2)


def test_a_missing_document_lets_go_of_the_others() -> None:
    pool = Pool(Device(), 100)
    with pytest.raises(ArenaError, match="second has no lost"):
        held(pool, ["1", "lost", "2"])
    assert pool.figures().num_held == 0
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
    assert pool.figures().num_held == 0
