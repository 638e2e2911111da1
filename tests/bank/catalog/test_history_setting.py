"""How long a bank keeps history: as somebody said last, whoever opens its folder."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from bank_service.service.offline import opened, scrub
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.upkeep import history_cleaner
from bank_service.values.config import BankConfig
from tests.bank import inside
from tests.bank.catalog.test_history import put, texts
from tests.bank.search.test_as_of import open_bank


@pytest.mark.asyncio
async def test_a_start_without_the_flag_keeps_history_as_it_was_last_said(
    data_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_cleaner, "CLEAN_SECONDS", 0.05)

    async def serve(first: int) -> None:
        """A bank that is served without the flag answers as of then, and keeps what changes now."""
        config = BankConfig(data_dir=data_dir)
        async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
            for text in ("one", "another"):
                changed = await client.put("b", text)
            await asyncio.sleep(0.3)  # rounds of the bank's own cleaner
            (hit,) = (await client.query(document_ids=["a"], as_of=first)).hits
            assert hit.version == 1
            (hit,) = (await client.query(document_ids=["b"], as_of=changed.sequence - 1)).hits
            assert hit.version == changed.version - 1, "it goes on keeping"

    async with open_bank(data_dir, history_seconds=3600) as bank:
        first = await put(bank, "a", "the first")
        await put(bank, "a", "the second")
    await serve(first)
    counts = await scrub(BankConfig(data_dir=data_dir), HashEncoder(), HashEmbedder())
    assert counts.num_lost == 0
    await serve(first)
    # A catalog from before the flag was remembered doesn't know, and loses nothing either.
    _forget_setting(data_dir)
    await scrub(BankConfig(data_dir=data_dir), HashEncoder(), HashEmbedder())
    await serve(first)
    assert "until it is started once with --history-seconds" in caplog.text
    async with open_bank(data_dir, history_seconds=7200) as bank:
        assert inside.stores(bank).catalog.history_seconds == 7200
    async with open_bank(data_dir, history_seconds=None) as bank:
        assert inside.stores(bank).catalog.history_seconds == 7200
    async with open_bank(data_dir, history_seconds=0) as bank:
        await inside.upkeep(bank).history_cleaner.clean()
    async with open_bank(data_dir, history_seconds=None) as bank:
        assert inside.stores(bank).catalog.history_seconds == 0
        await put(bank, "a", "a third")
        assert (await bank.stats()).totals.num_past_versions == 0


@pytest.mark.asyncio
async def test_a_new_bank_keeps_no_history_and_an_offline_tool_drops_none(data_dir: Path) -> None:
    async with open_bank(data_dir, history_seconds=None) as bank:
        await put(bank, "a", "the first")
        await put(bank, "a", "the second")
        assert (await bank.stats()).totals.num_past_versions == 0
    _forget_setting(data_dir)  # as a bank has it that never kept any and was made by an earlier version
    async with open_bank(data_dir, history_seconds=None) as bank:
        await put(bank, "a", "a third")
        assert (await bank.stats()).totals.num_past_versions == 0
    async with open_bank(data_dir, history_seconds=3600) as bank:
        first = await put(bank, "a", "a fourth")
        await put(bank, "a", "a fifth")
        assert (await bank.stats()).totals.num_past_versions == 2
    await asyncio.sleep(1.1)
    async with opened(BankConfig(data_dir=data_dir, history_seconds=1), HashEncoder(), HashEmbedder()) as bank:
        assert inside.upkeep(bank).history_cleaner._task is None
        assert await texts(bank, first) == {"a": "a fourth"}, "over, but not for a tool to drop"


def _forget_setting(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        connection.execute("DROP TABLE history_setting")
        connection.commit()
