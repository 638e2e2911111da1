"""Snapshots of a running bank, and what is restored from them."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from bank_service.backup.restore import restore
from bank_service.backup.snapshot import snapshot_folder
from bank_service.errors import BankInUseError, SnapshotError
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.errors import DataLossError, InvalidArgumentError
from bank_service.wire.generated import bank_pb2 as pb
from tests.bank.catalog.test_history import put
from tests.bank.records.test_fetch import blob, ingested, whole
from tests.bank.search.test_as_of import open_bank


async def snapshot(client: Client, target: str | Path) -> Any:
    """The last report."""
    async with own_errors():
        return [part async for part in client.stub.CreateSnapshot(pb.CreateSnapshotRequest(target=str(target)))][-1]


def restored(source: str | Path, data_dir: Path) -> Path:
    assert list(restore(str(source), data_dir))[-1].manifest is not None
    return data_dir


async def write(client: Client, name: str, log: list[tuple[int, str, str | None]], stop: asyncio.Event) -> None:
    """Puts and deletes; ``log`` gets (sequence, id, text) of each."""
    generator = random.Random(name)
    alive: set[str] = set()
    while not stop.is_set():
        id = f"{name}-{generator.randrange(8)}"
        if id in alive and generator.random() < 0.4:
            log.append(((await client.delete(id)).sequence, id, None))
            alive.discard(id)
        else:
            text = f"{id} says {generator.random()}"
            log.append(((await client.put(id, text)).sequence, id, text))
            alive.add(id)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["folder", "file", "s3"])
async def test_a_snapshot_taken_under_load_is_the_bank_at_its_sequence(
    server: BankServer, client: Client, embedder: Embedder, tmp_path: Path, objects_url: str, kind: str
) -> None:
    target = {"folder": f"{tmp_path}/target", "file": f"file://{tmp_path}/target", "s3": objects_url}
    await ingested(client, 30)
    log: list[tuple[int, str, str | None]] = []
    stop = asyncio.Event()
    writers = [asyncio.create_task(write(client, name, log, stop)) for name in "abc"]
    while len(log) < 20:
        await asyncio.sleep(0.01)
    first = await snapshot(client, target[kind])
    while len(log) < 60:
        await asyncio.sleep(0.01)
    second = await snapshot(client, target[kind])
    stop.set()
    await asyncio.gather(*writers)
    assert first.is_whole and second.is_whole and 30 < first.sequence < second.sequence
    assert first.num_copied == first.num_gradients and second.num_copied < second.num_gradients
    expected: dict[str, str | None] = {f"d{n}": f"text number {n}" for n in range(30)}
    for sequence, id, text in sorted(log):
        if sequence <= second.sequence:
            expected[id] = text
    expected = {id: text for id, text in expected.items() if text is not None}
    assert sorted(log)[-1][0] > second.sequence, "the load went on after the snapshot"
    config = BankConfig(data_dir=restored(target[kind], tmp_path / "elsewhere"))
    async with BankServer(config, HashEncoder(), embedder) as other, Client(other.address.target) as copy:
        entries = (await copy.list(page_size=1000)).documents
        assert {entry.id: (await copy.get(entry.id)).document.text for entry in entries} == expected
        assert (await copy.stats()).sequence == second.sequence
        for entry in entries:
            await whole(copy, [entry.gradient_digest])
        hits = (await copy.query(text="says", top_k=64)).hits
        assert {hit.id for hit in hits} == set(expected)


@pytest.mark.asyncio
async def test_what_goes_during_a_snapshot_is_kept_for_it_and_removed_after_it(
    server: BankServer, client: Client, data_dir: Path, tmp_path: Path
) -> None:
    digests = await ingested(client, 300)
    call = client.stub.CreateSnapshot(pb.CreateSnapshotRequest(target=str(tmp_path / "target")))
    first = await call.read()
    assert not first.is_whole
    for number in range(0, 300, 30):
        await client.delete(f"d{number}")
    parts = [first]
    while (part := await call.read()) is not grpc.aio.EOF:
        parts.append(part)
    assert parts[-1].is_whole and parts[-1].num_gradients == 300
    assert [part.num_done for part in parts] == sorted(part.num_done for part in parts)
    restored(tmp_path / "target", tmp_path / "elsewhere")
    assert all(blob(tmp_path / "elsewhere", digest).exists() for digest in digests)
    while sum(blob(data_dir, digest).exists() for digest in digests[::30]):  # the test's own limit ends it
        await client.stats()


@pytest.mark.asyncio
async def test_a_bank_that_stops_ends_a_snapshot_that_nobody_reads_any_more(
    data_dir: Path, embedder: Embedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BankConfig(data_dir=data_dir, drain_seconds=0)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await ingested(client, 300)
        call = client.stub.CreateSnapshot(pb.CreateSnapshotRequest(target=str(tmp_path / "target")))
        assert not (await call.read()).is_whole
        await server.stop()
        assert "failed" not in caplog.text
    assert not (data_dir / "snapshot.new").exists()


@pytest.mark.asyncio
async def test_a_snapshot_that_is_left_has_ended_before_the_next_may_begin(data_dir: Path, tmp_path: Path) -> None:
    async with open_bank(data_dir) as bank:
        await put(bank, "a", "a text")
        async with aclosing(bank.snapshot(str(tmp_path / "target"))) as left:
            await anext(left)
            assert (data_dir / "snapshot.new").exists()
        assert not (data_dir / "snapshot.new").exists()
        assert [part async for part in bank.snapshot(str(tmp_path / "target"))][-1].manifest is not None


@pytest.mark.asyncio
async def test_a_snapshot_again_copies_what_is_new_and_drops_what_went(
    client: Client, data_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    digests = await ingested(client, 5)
    assert (await snapshot(client, target)).num_copied == 5
    assert target.stat().st_mode & 0o077 == 0
    assert (target / "blobs" / digests[0][:2] / digests[0][2:]).samefile(blob(data_dir, digests[0]))
    await client.delete("d0")
    await client.put("new", "something new")
    report = await snapshot(client, target)
    assert (report.num_gradients, report.num_copied) == (5, 1)
    assert not (target / "blobs" / digests[0][:2] / digests[0][2:]).exists()
    assert len(list(target.glob("catalog-*"))) == 1


@pytest.mark.asyncio
async def test_a_damaged_gradient_is_mended_on_the_way_into_a_snapshot_or_stops_it(
    client: Client, data_dir: Path, tmp_path: Path
) -> None:
    digests = await ingested(client, 3)
    record = blob(data_dir, digests[0]).read_bytes()
    (uploaded,) = await client.upload(*upload_of(pb.Document(id="mine", text="mine"), record))
    await client.delete("d0")  # the uploaded document has its gradient now, alone
    blob(data_dir, digests[1]).write_bytes(b"rot")
    assert (await snapshot(client, tmp_path / "target")).is_whole
    blob(data_dir, uploaded.gradient_digest).unlink()
    error = await client.refused(snapshot(client, tmp_path / "other"), DataLossError)
    assert error.digest == uploaded.gradient_digest
    with pytest.raises(SnapshotError, match=r"has no manifest.json.*was not finished"):
        restored(tmp_path / "other", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.asyncio
async def test_what_was_linked_while_it_was_damaged_is_copied_anew_when_the_bank_has_mended_it(
    client: Client, data_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    digests = await ingested(client, 3)
    await snapshot(client, target)
    with blob(data_dir, digests[1]).open("r+b") as file:  # in place: the snapshot has the same file
        file.write(b"rot")
    assert (await snapshot(client, target)).num_copied == 0, "nobody knows yet"
    await client.fetch(digests)
    report = await snapshot(client, target)
    while not report.num_copied:  # the cache had it: the next one finds the bank's own mended
        blob(data_dir, digests[1]).unlink()
        report = await snapshot(client, target)
    assert (report.is_whole, report.num_copied) == (True, 1)
    restored(target, tmp_path / "elsewhere")


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a gradient is missing": ("blobs/??/*", Path.unlink),
    "a gradient of the snapshot must match|gradient .* damaged": ("blobs/??/*", lambda path: path.write_bytes(b"rot")),
    "catalog-.* missing": ("catalog-*", Path.unlink),
    "catalog-.* damaged": ("catalog-*", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "no manifest.json": ("manifest.json", Path.unlink),
    "must be a snapshot's manifest": ("manifest.json", lambda path: path.write_text("{")),
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A snapshot of its own bytes: one that is linked would damage the bank."""
    return tmp_path / "copied"


@pytest.mark.asyncio
@pytest.mark.parametrize("message", DAMAGES)
async def test_a_damaged_snapshot_is_not_restored(client: Client, tmp_path: Path, copied: Path, message: str) -> None:
    await ingested(client, 3)
    await snapshot(client, tmp_path / "target")
    shutil.copytree(tmp_path / "target", copied)
    pattern, damage = DAMAGES[message]
    damage(next(copied.glob(pattern)))
    with pytest.raises(SnapshotError, match=message.replace("a gradient is missing", "gradient .* is missing")):
        restored(copied, tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "copied", "target"], "nothing is left behind"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", "manifest.json.bak", "catalog-2024.csv", "catalog-photos/a.jpg", "blobs/mine.txt",
        "blobs/new/draft.txt", "blobs/ab/notes.txt", "old/manifest.json",
    ],
)  # fmt: skip
async def test_a_target_with_a_file_of_somebody_else_is_refused_and_keeps_it(
    client: Client, tmp_path: Path, name: str
) -> None:
    await ingested(client, 1)
    await snapshot(client, tmp_path / "target")
    file = tmp_path / "target" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    error = await client.refused(snapshot(client, tmp_path / "target"), InvalidArgumentError)
    assert error.field == "target" and name in error.message
    assert file.read_text() == "mine"


@pytest.mark.asyncio
async def test_a_snapshot_removes_the_unfinished_files_of_a_killed_one(client: Client, tmp_path: Path) -> None:
    target = tmp_path / "target"
    await ingested(client, 1)
    await snapshot(client, target)
    whole = sorted(path.name for path in target.rglob("*"))
    (gradient,) = target.glob("blobs/??/*")
    for path in (target / "manifest.json", next(target.glob("catalog-*")), gradient):
        path.with_name(f"{path.name}.new").write_text("half")  # as older versions named it
    (target / "blobs" / "new" / "17").write_text("half")
    assert (await snapshot(client, target)).is_whole
    assert sorted(path.name for path in target.rglob("*")) == whole


@pytest.mark.asyncio
async def test_a_target_outside_the_rules_and_a_folder_that_is_not_empty_are_refused(
    client: Client, data_dir: Path, tmp_path: Path, embedder: Embedder
) -> None:
    await ingested(client, 1)
    for target in ("relative", "", "/", f"{tmp_path}/../x", "nosuch://bucket/x"):
        assert (await client.refused(snapshot(client, target), InvalidArgumentError)).field == "target"
    await snapshot(client, tmp_path / "target")
    with pytest.raises(SnapshotError, match="must be absent or an empty folder"):
        restored(tmp_path / "target", data_dir)
    config = BankConfig(data_dir=tmp_path / "b2")
    async with BankServer(config, HashEncoder(), embedder) as second, Client(second.address.target) as another:
        error = await client.refused(snapshot(another, tmp_path / "target"), InvalidArgumentError)
        assert "collection" in error.message


@pytest.mark.asyncio
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_a_bank_writes_snapshots_below_its_root_and_without_one_for_its_own_machine_alone(
    data_dir: Path, embedder: Embedder, tmp_path: Path, host: str
) -> None:
    config = BankConfig(data_dir=data_dir, host=host)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        if host == "0.0.0.0":
            await client.refused(snapshot(client, tmp_path / "target"), InvalidArgumentError)
        else:
            assert (await snapshot(client, tmp_path / "target")).is_whole
    config = BankConfig(data_dir=data_dir, host=host, snapshot_root=str(tmp_path / "root"))
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        assert (await snapshot(client, tmp_path / "root" / "a")).is_whole
        error = await client.refused(snapshot(client, tmp_path / "rooted"), InvalidArgumentError)
        assert "--snapshot-root" in error.message
        await client.refused(snapshot(client, "s3://elsewhere/a"), InvalidArgumentError)
    config = BankConfig(data_dir=data_dir, host=host, snapshot_root="ftp://user:s3cret@host/root")
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        error = await client.refused(snapshot(client, "ftp://user:s3cret@host/other"), InvalidArgumentError)
        assert "ftp://…@host/root" in error.message and "s3cret" not in error.message


@pytest.mark.asyncio
async def test_a_bank_that_does_not_run_is_taken_from_its_folder(
    data_dir: Path, embedder: Embedder, tmp_path: Path
) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        digests = await ingested(client, 3)
        with pytest.raises(BankInUseError):
            list(snapshot_folder(data_dir, str(tmp_path / "target")))
    last = list(snapshot_folder(data_dir, str(tmp_path / "target")))[-1]
    assert last.manifest is not None and last.num_copied == 3
    manifest = json.loads((tmp_path / "target" / "manifest.json").read_text())
    assert manifest["num_gradients"] == 3 and manifest["sequence"] == 3
    config = BankConfig(data_dir=restored(tmp_path / "target", tmp_path / "elsewhere"))
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await whole(client, digests)
    with pytest.raises(SnapshotError, match="must be the folder of a bank"):
        list(snapshot_folder(tmp_path / "nowhere", str(tmp_path / "target")))
