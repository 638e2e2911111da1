"""Erasing with a cache, a disk, readers or a snapshot in its way: what ends it, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from bank_service.bank import Bank
from bank_service.catalog.contract import Catalog
from bank_service.errors import UnavailableError
from bank_service.runtime.background import cancelled
from bank_service.runtime.metrics import BankMetrics
from bank_service.upkeep import eraser
from tests.bank import inside
from tests.bank.catalog.test_history import put
from tests.bank.records.test_discard import bank_with, read
from tests.bank.search.collection import usearch_of
from tests.bank.search.test_as_of import open_bank
from tests.bank.upkeep.test_erasure import filled, num_erasures, removable, traces, unremovable, within_the_bound


async def put_on(bank: Bank) -> None:
    for number in range(10_000):
        await put(bank, "b", f"text number {number}")
        await asyncio.sleep(0.02)


async def digest_of(bank: Bank, id: str) -> str:
    return (await bank.get("", id)).gradient.digest


@pytest.mark.asyncio
async def test_a_purge_is_erased_when_the_cached_gradient_has_expired_though_the_cache_stays_away(
    data_dir: Path, redis_server: str
) -> None:
    async with bank_with(redis_server, data_dir, cache_ttl_seconds=4, cache_timeout_ms=200) as (bank, redis):
        await put(bank, "a", "a text")
        await read(bank, "a")
        pid = (await redis.info("server"))["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            await bank.delete("", "a", purge=True)
            purged = time.monotonic()
            assert not await inside.upkeep(bank).eraser.erase()
            await within_the_bound(lambda: not num_erasures(data_dir))
            assert time.monotonic() > purged + 3, "the cache may have it until then"
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.asyncio
async def test_purges_whose_gradients_stay_hold_up_no_other(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eraser, "MAX_PER_ROUND", 3)
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        paths = [inside.stores(bank).blobs.path(await digest_of(bank, f"d{number}")) for number in range(3)]
        for number, path in enumerate(paths):
            unremovable(path)
            with pytest.raises(UnavailableError):
                await bank.delete("", f"d{number}", purge=True)
        await asyncio.sleep(2 * eraser.ERASE_SECONDS)
        await bank.delete("", "a", purge=True)
        await within_the_bound(lambda: not traces(data_dir, embedding))
        await within_the_bound(lambda: num_erasures(data_dir) == 3)
        erasing = inside.upkeep(bank).eraser
        await within_the_bound(lambda: erasing.num_pending == 3)  # it counts after the catalog's commit
        assert erasing.oldest_seconds > eraser.ERASE_SECONDS
        for path in paths:
            removable(path)
        await within_the_bound(lambda: not erasing.num_pending)
        assert not any(path.exists() for path in paths) and erasing.oldest_seconds == 0


@pytest.mark.asyncio
async def test_a_bank_closes_whatever_goes_wrong_in_its_last_round(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_bank(data_dir) as bank:
        await put(bank, "a", "a text")

        async def failing() -> bool:
            raise RuntimeError("a bug")

        monkeypatch.setattr(inside.upkeep(bank).eraser, "erase", failing)
    assert not inside.stores(bank).catalog._writer._thread.is_alive()
    with pytest.raises(RuntimeError, match="shutdown"):
        inside.pools(bank).reads.submit(int)


@pytest.mark.asyncio
async def test_readers_that_overlap_do_not_keep_a_purged_text_in_the_log(data_dir: Path) -> None:
    ended = threading.Event()
    num_reads = []

    def reading(catalog: Catalog, delay: float) -> None:
        time.sleep(delay)
        while not ended.is_set():
            with catalog.view() as view:
                view.sequence()
                time.sleep(0.4)
            num_reads.append(1)

    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        catalog = inside.stores(bank).catalog
        readers = [threading.Thread(target=reading, args=(catalog, 0.03 * number)) for number in range(12)]
        for reader in readers:
            reader.start()
        writing = asyncio.create_task(put_on(bank))  # so that no reader finds the log copied
        try:
            await asyncio.sleep(0.5)
            await bank.delete("", "a", purge=True)
            await within_the_bound(lambda: not num_erasures(data_dir))
            assert not traces(data_dir, embedding) and len(num_reads) > 3
            assert not writing.done()
        finally:
            ended.set()
            await cancelled(writing)
            for reader in readers:
                await asyncio.to_thread(reader.join)


@pytest.mark.asyncio
async def test_a_purge_is_not_erased_before_a_snapshot_that_may_have_its_text_has_ended(
    data_dir: Path, tmp_path: Path
) -> None:
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        path = inside.stores(bank).blobs.path(await digest_of(bank, "a"))
        snapshot = bank.snapshot(str(tmp_path / "snapshot"))
        await anext(snapshot)
        await bank.delete("", "a", purge=True)
        for _ in range(2):
            assert not await inside.upkeep(bank).eraser.erase()
        assert path.exists() and traces(data_dir, embedding) and num_erasures(data_dir) == 1
        async for _ in snapshot:
            pass
        await within_the_bound(lambda: not num_erasures(data_dir))
        assert not path.exists() and not traces(data_dir, embedding)


@pytest.mark.asyncio
async def test_nor_is_one_whose_gradients_went_before_the_snapshot_began(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eraser, "ERASE_SECONDS", 3600)
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        await bank.delete("", "a", purge=True)
        # As where another document has the same gradients; else the snapshot's keeping them would hold it up.
        monkeypatch.setattr(inside.discarder(bank), "is_done", lambda digests: True)
        snapshot = bank.snapshot(str(tmp_path / "snapshot"))
        async with aclosing(snapshot):
            await anext(snapshot)
            assert not await inside.upkeep(bank).eraser.erase() and num_erasures(data_dir) == 1
            assert traces(data_dir / "snapshot.new", embedding), "else this test shows nothing"
        assert await inside.upkeep(bank).eraser.erase()
        assert not num_erasures(data_dir) and not traces(data_dir, embedding)


@pytest.mark.asyncio
async def test_a_purge_that_failed_and_is_not_repeated_is_forgotten_with_its_digests(data_dir: Path) -> None:
    async with open_bank(data_dir) as bank:
        embedding = await filled(bank)
        digest = await digest_of(bank, "a")
        path = inside.stores(bank).blobs.path(digest)
        unremovable(path)
        with pytest.raises(UnavailableError):
            await bank.delete("", "a", purge=True)
        assert num_erasures(data_dir) == 1
        removable(path)
        await within_the_bound(lambda: not path.exists() and not num_erasures(data_dir))
        await within_the_bound(lambda: not traces(data_dir, embedding, digest))
        assert (await bank.delete("", "a", 2, purge=True)).version == 2, "nothing is left of it to be removed: no error"


@pytest.mark.asyncio
async def test_what_is_not_erased_for_long_is_said_in_the_log_and_in_the_metrics(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(eraser, "LATE_SECONDS", 1.0)
    monkeypatch.setattr(eraser, "ERASE_SECONDS", 0.1)
    metrics = BankMetrics()
    async with open_bank(data_dir) as bank:
        inside.publish(bank, metrics)
        await put(bank, "a", "a text")
        path = inside.stores(bank).blobs.path(await digest_of(bank, "a"))
        unremovable(path)
        with pytest.raises(UnavailableError):
            await bank.delete("", "a", purge=True)
        await within_the_bound(lambda: "1 purges are not erased yet" in caplog.text)
        await asyncio.sleep(1)
        assert caplog.text.count("purges are not erased yet") == 1
        value = metrics.registry.get_sample_value
        assert value("regrad_bank_pending_erasures") == 1
        assert (value("regrad_bank_oldest_erasure_seconds") or 0) > 1
        removable(path)
        await within_the_bound(lambda: value("regrad_bank_pending_erasures") == 0)
        assert value("regrad_bank_oldest_erasure_seconds") == 0


@pytest.mark.asyncio
async def test_the_metrics_count_a_purge_while_its_first_round_is_under_way(data_dir: Path) -> None:
    metrics = BankMetrics()
    value = metrics.registry.get_sample_value
    async with open_bank(data_dir) as bank:
        inside.publish(bank, metrics)
        await put(bank, "a", "a text")
        async with usearch_of(bank).compactor.lock:  # the round can't rebuild the index
            await bank.delete("", "a", purge=True)
            await within_the_bound(lambda: value("regrad_bank_pending_erasures") == 1)
            assert (value("regrad_bank_oldest_erasure_seconds") or 0) > 0
        await within_the_bound(lambda: value("regrad_bank_pending_erasures") == 0)
