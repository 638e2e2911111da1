"""The index behind the catalog, where following it fails."""

from __future__ import annotations

import asyncio
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bank_service.catalog.factory import open_catalog
from bank_service.errors import NotFoundError, UnavailableError
from bank_service.search.usearch import index_follower
from bank_service.search.usearch.index_follower import MAX_FAILURES, IndexFollower
from bank_service.search.usearch.usearch_index import UsearchIndex
from tests.bank.catalog.test_catalog import IDENTITY, document, gradient
from tests.bank.catalog.test_history import put
from tests.bank.search.collection import usearch_of
from tests.bank.search.test_as_of import open_bank


class FailingIndex(UsearchIndex):
    """Fails in a way that nobody foresaw, as often as it is told to."""

    def __init__(self, dimension: int, failures: int) -> None:
        super().__init__(dimension)
        self.failures = failures

    def put(self, namespace: str, keys: Sequence[int], vectors: np.ndarray) -> None:
        if self.failures:
            self.failures -= 1
            raise ZeroDivisionError("unforeseen")
        super().put(namespace, keys, vectors)


@pytest.mark.asyncio
@pytest.mark.parametrize("failures", [1, MAX_FAILURES])
async def test_a_fault_that_nobody_foresaw_is_logged_told_and_tried_again(
    tmp_path: Path, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    index = FailingIndex(IDENTITY.embedding_dimension, failures)
    follower = IndexFollower(catalog, index, tmp_path / "index", pool, 1000)
    await follower.start()
    sequence = catalog.put(document(), gradient(), None).result().stored.sequence
    follower.wake()
    async with asyncio.timeout(9):  # less than a query waits for an index that only lags
        if failures == MAX_FAILURES:
            with pytest.raises(UnavailableError, match="times in a row, last with ZeroDivisionError: unforeseen"):
                await follower.reach(sequence)
            while follower.sequence < sequence:
                await asyncio.sleep(0.05)
        await follower.reach(sequence)
    assert caplog.text.count("can't follow the catalog") == failures
    await follower.stop()
    catalog.close()


@pytest.mark.asyncio
async def test_who_writes_waits_for_an_index_that_is_far_behind(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_follower, "MAX_LAG", 3)
    async with open_bank(data_dir) as bank:
        async with usearch_of(bank).follower.paused():
            for number in range(4):
                await put(bank, f"d{number}", f"text {number}")
            late = asyncio.create_task(put(bank, "late", "one more"))
            abandoned = asyncio.create_task(put(bank, "abandoned", "and one"))
            done, _ = await asyncio.wait([late, abandoned], timeout=0.5)
            assert not done
            assert usearch_of(bank).sequence == 0
            abandoned.cancel()
            await bank.delete("", "d0")  # makes no more work than it saves
        await late
        with pytest.raises(asyncio.CancelledError):
            await abandoned
        with pytest.raises(NotFoundError):
            await bank.get("", "abandoned")


@pytest.mark.asyncio
async def test_nobody_waits_to_write_for_an_index_that_can_not_follow(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    follower = IndexFollower(catalog, FailingIndex(IDENTITY.embedding_dimension, 1000), tmp_path / "index", pool, 1000)
    await follower.start()
    catalog.put(document(), gradient(), None).result()
    waiting = asyncio.create_task(follower.keep_up(index_follower.MAX_LAG + 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    follower.wake()
    async with asyncio.timeout(9):
        await waiting
    await follower.stop()
    catalog.close()


class GatedIndex(UsearchIndex):
    """Holds what it is told to before the gate, and counts how many are at work at once."""

    def __init__(self, dimension: int, held: str) -> None:
        super().__init__(dimension)
        self._held = held
        self._lock = threading.Lock()
        self._num_inside = 0
        self.most_inside = 0
        self.entered = threading.Event()
        self.gate = threading.Event()

    def put(self, namespace: str, keys: Sequence[int], vectors: np.ndarray) -> None:
        with self._counted("put"):
            super().put(namespace, keys, vectors)

    def save(self, folder: Path, collection_id: str, sequence: int) -> None:
        with self._counted("save"):
            super().save(folder, collection_id, sequence)

    @contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        with self._lock:
            self._num_inside += 1
            self.most_inside = max(self.most_inside, self._num_inside)
        if method == self._held:
            self.entered.set()
            assert self.gate.wait(30)
        yield
        with self._lock:
            self._num_inside -= 1


@pytest.mark.asyncio
@pytest.mark.parametrize("held", ["save", "put"])
async def test_a_follower_that_stops_saves_after_what_it_had_under_way_and_not_beside_it(
    tmp_path: Path, pool: ThreadPoolExecutor, held: str
) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    index = GatedIndex(IDENTITY.embedding_dimension, held)
    # Without a snapshot at each change, the one at the end is the first.
    follower = IndexFollower(catalog, index, tmp_path / "index", pool, 1 if held == "save" else 1000)
    await follower.start()
    sequence = catalog.put(document(), gradient(), None).result().stored.sequence
    follower.wake()
    assert await asyncio.to_thread(index.entered.wait, 30)
    stopping = asyncio.create_task(follower.stop())
    done, _ = await asyncio.wait([stopping], timeout=0.3)
    assert not done, "it stopped while a thread was still at the index"
    index.gate.set()
    await stopping
    assert index.most_inside == 1
    again = IndexFollower(catalog, UsearchIndex(IDENTITY.embedding_dimension), tmp_path / "index", pool, 1000)
    await again.start()
    assert again.sequence == sequence
    await again.stop()
    catalog.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(("num_vectors", "num_bytes"), [(1, 64), (1000, 20_000)])  # usearch says nothing of the first
async def test_a_follower_on_a_full_disk_says_so_and_stops(
    tmp_path: Path, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture, num_vectors: int, num_bytes: int
) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    index = UsearchIndex(IDENTITY.embedding_dimension)
    follower = IndexFollower(catalog, index, tmp_path / "index", pool, 1000)
    await follower.start()
    sequence = catalog.put(document(), gradient(), None).result().stored.sequence
    follower.wake()
    await follower.reach(sequence)
    index.put("other", range(num_vectors), np.ones((num_vectors, IDENTITY.embedding_dimension), np.float32))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            await follower.save()
        await follower.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "the index snapshot could not be written" in caplog.text
    catalog.close()


@pytest.mark.asyncio
async def test_a_follower_that_stops_leaves_nothing_for_the_next_start(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    index = UsearchIndex(IDENTITY.embedding_dimension)
    follower = IndexFollower(catalog, index, tmp_path / "index", pool, 1000)
    await follower.start()
    sequence = catalog.put(document(), gradient(), None).result().stored.sequence  # of which nobody has told it
    await follower.stop()
    saved = UsearchIndex(IDENTITY.embedding_dimension)
    assert saved.load(tmp_path / "index", catalog.collection_id) == follower.sequence == sequence
    catalog.close()
