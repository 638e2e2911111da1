"""A move that is interrupted, killed, or meets damage."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bank_service.backup.move import MOVED_FILE, BankPlace, move
from bank_service.catalog.factory import MOVE_FILE
from bank_service.errors import CatalogDamagedError, CollectionMismatchError, DataLossError
from bank_service.service.offline import scrub
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from tests.bank.backup.test_move import bank, contents
from tests.bank.postgres_server import shared_server
from tests.bank.records.test_fetch import blob, ingested, whole


@pytest.mark.asyncio
async def test_a_move_goes_on_where_it_was_interrupted(tmp_path: Path, objects_url: str) -> None:
    source = BankPlace(tmp_path / "source")
    target = BankPlace(tmp_path / "target", shared_server().new_schema(), objects_url)
    async with bank(source) as client:
        digests = await ingested(client, 100)
    steps = move(source, target)
    assert next(steps).num_copied == 64
    steps.close()
    for place in (target, BankPlace(target.data_dir, target.catalog)):
        with pytest.raises(CollectionMismatchError, match="run that `regrad move` again"):
            async with bank(place):
                pass
    async with bank(source) as client:
        await client.delete("d0")
        changed = await client.put("d1", "another text")
    *_, last = move(source, target)
    assert last.num_gradients == 99 and last.num_copied < 99 - 32
    assert not (target.data_dir / MOVE_FILE).exists()
    with pytest.raises(CollectionMismatchError, match="moved to .* already"):
        list(move(source, target))
    (target.data_dir / MOVED_FILE).rename(target.data_dir / MOVE_FILE)  # as if it had been killed after its commit
    *_, last = move(source, target)
    assert last.num_copied == 0 and last.num_rows["versions"] == 100
    async with bank(target) as client:
        await whole(client, [*digests[2:60], changed.gradient_digest])
        assert (await client.query(text="another text", top_k=1)).hits[0].id == "d1"
        assert len((await client.list(page_size=1000)).documents) == 99
    lost = BankPlace(tmp_path / "lost", target.catalog, objects_url)
    lost.data_dir.mkdir()
    *_, last = move(lost, BankPlace(tmp_path / "back"))
    assert last.num_copied == 99 and [path.name for path in lost.data_dir.iterdir()] == ["lock"]


@pytest.mark.asyncio
async def test_a_source_that_went_on_after_the_commit_needs_a_new_target(tmp_path: Path) -> None:
    source, target = BankPlace(tmp_path / "source"), BankPlace(tmp_path / "target", shared_server().new_schema())
    async with bank(source) as client:
        await ingested(client, 3)
    *_, last = move(source, target)
    async with bank(source) as client:
        await client.put("d0", "another text")
    (target.data_dir / MOVED_FILE).rename(target.data_dir / MOVE_FILE)
    with pytest.raises(CatalogDamagedError, match="the table collection must be the same after the move"):
        list(move(source, target))


@pytest.mark.asyncio
async def test_a_damaged_gradient_is_named_and_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    source, target = BankPlace(tmp_path / "source"), BankPlace(tmp_path / "target")
    async with bank(source) as client:
        first, second = await ingested(client, 2)
    record = blob(source.data_dir, first).read_bytes()
    blob(source.data_dir, first).write_bytes(record[:-1] + b"?")
    with pytest.raises(DataLossError, match=first):
        list(move(source, target))
    assert not (target.data_dir / "catalog.sqlite").exists()
    blob(source.data_dir, first).write_bytes(record)
    blob(target.data_dir, second).write_bytes(b"rot")
    *_, last = move(source, target)
    assert last.num_copied == 2
    assert [blob(target.data_dir, digest).read_bytes() for digest in (first, second)] == [
        record, blob(source.data_dir, second).read_bytes(),
    ]  # fmt: skip


@pytest.mark.asyncio
async def test_the_last_commits_of_a_bank_that_was_killed_come_along(tmp_path: Path) -> None:
    source, killed = BankPlace(tmp_path / "source"), BankPlace(tmp_path / "killed")
    async with bank(source) as client:
        digests = await ingested(client, 3)
        shutil.copytree(source.data_dir, killed.data_dir, ignore=shutil.ignore_patterns("redis"))
    assert (killed.data_dir / "catalog.sqlite-wal").stat().st_size > 0
    files = contents(killed.data_dir)
    *_, last = move(killed, BankPlace(tmp_path / "target"))
    assert last.num_rows["versions"] == 3 and contents(killed.data_dir) == files
    async with bank(BankPlace(tmp_path / "target")) as client:
        await whole(client, digests)


@pytest.mark.asyncio
async def test_a_catalog_of_an_older_version_is_refused(tmp_path: Path) -> None:
    source = BankPlace(tmp_path / "source")
    async with bank(source) as client:
        await ingested(client, 1)
    with closing(sqlite3.connect(source.data_dir / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE collection SET schema_version = 8")
    with pytest.raises(CollectionMismatchError, match="got 8; start its bank once with this version"):
        list(move(source, BankPlace(tmp_path / "target")))


@pytest.mark.only_test_all
@pytest.mark.asyncio
async def test_a_move_that_is_killed_at_any_time_goes_on(tmp_path: Path) -> None:
    source = BankPlace(tmp_path / "source")
    target = BankPlace(tmp_path / "target", shared_server().new_schema())
    async with bank(source, history_seconds=3600) as client:
        await ingested(client, 600)
        await ingested(client, 10)
    files = contents(source.data_dir)
    program = (
        "import sys; from pathlib import Path; from bank_service.backup.move import BankPlace, move\n"
        "print('ready', flush=True)\n"
        "print(list(move(BankPlace(Path(sys.argv[1])), BankPlace(Path(sys.argv[2]), sys.argv[3])))[-1].num_copied)"
    )
    command = [sys.executable, "-c", program, str(source.data_dir), str(target.data_dir), str(target.catalog)]
    num_killed, seconds = 0, 0.05
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                num_killed += 1
                seconds += 0.08
            else:
                assert process.returncode == 0
        if (target.data_dir / "catalog.id").exists() and not (target.data_dir / MOVE_FILE).exists():
            break  # it had ended, perhaps a moment before the kill
    assert num_killed >= 2
    assert contents(source.data_dir) == files
    async with bank(target) as client:
        assert len((await client.list(page_size=1000)).documents) == 600
    counts = await scrub(BankConfig(data_dir=target.data_dir, catalog=target.catalog), HashEncoder(), HashEmbedder())
    assert (counts.num_gradients, counts.num_repaired, counts.num_lost) == (600, 0, 0)
