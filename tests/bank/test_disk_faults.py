"""Disks that are full, read-only or rotten: a clear error, no half-done write, and everything else goes on."""

from __future__ import annotations

import asyncio
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bank_service.errors import CatalogDamagedError
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.errors import UnavailableError
from tests.bank.bank_process import address_of, start_bank
from tests.bank.records.test_fetch import ingested, whole
from tests.small_disk import small_disk

DISK_MIB = 4


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small disk of this test's own."""
    with small_disk(f"{DISK_MIB}m") as folder:
        yield folder


def fill(disk: Path) -> Path:
    """Takes all that is free."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.asyncio
async def test_a_full_disk_refuses_writes_and_serves_reads_and_takes_writes_again_once_there_is_room(
    disk: Path, embedder: Embedder
) -> None:
    config = BankConfig(data_dir=disk / "bank")
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        digests = await ingested(client, 3)
        filler = fill(disk)
        error = await client.refused(client.put("new", "a new text " * 2000), UnavailableError)
        assert "No space left" in error.message or "SQLITE_FULL" in error.message
        await whole(client, digests)
        assert len((await client.query(text="text number", top_k=5)).hits) == 3
        assert len(list((config.data_dir / "blobs" / "tmp").iterdir())) == 0
        filler.unlink()
        put = await client.put("new", "a new text " * 2000)
        await whole(client, [*digests, put.gradient_digest])
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await whole(client, [*digests, put.gradient_digest])


@pytest.mark.asyncio
async def test_a_catalog_without_room_refuses_the_document_whole(disk: Path, embedder: Embedder) -> None:
    """There is room for the gradient, but not for the text."""
    config = BankConfig(data_dir=disk / "bank")
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        digests = await ingested(client, 3)
        filler = fill(disk)
        filler.write_bytes(bytes(filler.stat().st_size - 64 * 1024))
        error = await client.refused(client.put("new", "a new text " * 50_000), UnavailableError)
        assert "the catalog must be writable" in error.message and "is the disk full?" in error.message
        assert "INSERT" not in error.message and "a new text" not in error.message
        assert {entry.id for entry in (await client.list()).documents} == {"d0", "d1", "d2"}
        filler.unlink()
        put = await client.put("new", "a new text " * 50_000)
        assert put.version == 1
        await whole(client, [*digests, put.gradient_digest])


@pytest.mark.asyncio
async def test_a_folder_on_a_read_only_disk_is_not_opened(disk: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=disk / "bank")
    async with BankServer(config, HashEncoder(), embedder):
        pass
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=10)
    with pytest.raises(OSError, match="must be a folder that this user can write, got Read-only file system"):
        await BankServer(config, HashEncoder(), embedder).start()


@contextmanager
def read_only(folder: Path, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """As a kernel leaves a disk that had errors: no file below ``folder`` opens for writing, no write goes through.

    A remount does not do it: the kernel refuses one while files are open for writing. So the folder is covered by a
    read-only view of itself, and the process, whose open files that doesn't touch, may write no byte to any file.
    """
    for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
        if subprocess.run(command, capture_output=True, timeout=10).returncode:
            pytest.skip("mounting needs root and a kernel that lets it")
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=10)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.asyncio
async def test_a_disk_that_turns_read_only_under_a_bank_costs_it_writes_alone_and_no_restart(data_dir: Path) -> None:
    process = start_bank(data_dir)
    try:
        address = await address_of(process, data_dir)
        async with Client(address.target) as client:
            digests = await ingested(client, 3)
            with read_only(data_dir, process):
                for _ in range(3):
                    for write in (client.put("new", "a new text"), client.put("d0", "changed"), client.delete("d1")):
                        error = await client.refused(write, UnavailableError)
                        assert "must be writable" in error.message
                    # Many at once, so that the bank opens the catalog's file anew: for reading is all that it gets.
                    queries = [client.query(text=f"text number {n}", top_k=5) for n in range(16)]
                    assert all(len(answer.hits) == 3 for answer in await asyncio.gather(*queries))
                    await whole(client, digests)
            await client.put("new", "a new text")
            put = await client.put("d0", "changed")
            await client.delete("d1")
            assert {hit.id for hit in (await client.query(text="text", top_k=5)).hits} == {"new", "d0", "d2"}
            await whole(client, [digests[2], put.gradient_digest])
    finally:
        process.terminate()
        status = await asyncio.to_thread(process.wait, 30)
    assert status == 0


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xa5" * 8192
    path.write_bytes(content)


CATALOG_DAMAGES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "text": lambda path: path.write_text("this was a database once " * 400) and None,
    "truncated": truncated,
    "overwritten": overwritten,
}


@pytest.mark.asyncio
@pytest.mark.parametrize("damage", CATALOG_DAMAGES)
async def test_a_damaged_catalog_is_not_opened_and_costs_no_gradient(
    data_dir: Path, embedder: Embedder, damage: str
) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await ingested(client, 40)
    CATALOG_DAMAGES[damage](data_dir / "catalog.sqlite")
    for _ in range(2):  # the refused start changes nothing
        with pytest.raises(CatalogDamagedError, match=r"catalog.sqlite must be whole.*regrad restore"):
            await BankServer(config, HashEncoder(), embedder).start()
    assert len(list((data_dir / "blobs").glob("??/*"))) == 40
