"""Records under their digests. Tests without files run on each kind of store."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bank_service.blobs.blob_store import BlobStore
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.errors import DataLossError
from bank_service.wire.record import record_digest


@pytest.fixture(params=["folder", "remote"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return BlobStore.in_folder(tmp_path)
    return BlobStore(RemoteObjects.at(request.getfixturevalue("objects_url")))


def put(blobs: BlobStore, record: bytes) -> str:
    digest = record_digest(record)
    with blobs.hold(digest):
        blobs.put(digest, record)
    return digest


def path_of(folder: Path, digest: str) -> Path:
    return folder / digest[:2] / digest[2:]


def test_a_record_comes_back_also_from_a_store_opened_anew(tmp_path: Path) -> None:
    digest = put(BlobStore.in_folder(tmp_path), b"one")
    assert BlobStore.in_folder(tmp_path).get(digest) == b"one"


def test_putting_a_record_again_writes_nothing(tmp_path: Path) -> None:
    blobs = BlobStore.in_folder(tmp_path)
    digest = put(blobs, b"one")
    before = path_of(tmp_path, digest).stat()
    put(blobs, b"one")
    after = path_of(tmp_path, digest).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_missing_record_is_a_loss_that_names_its_digest(blobs: BlobStore) -> None:
    with pytest.raises(DataLossError) as caught:
        blobs.get("0" * 64)
    assert caught.value.digest == "0" * 64 and "missing" in caught.value.message


@pytest.mark.parametrize("damaged", [b"", b"oNe", b"one more"])
def test_a_corrupt_record_is_a_loss_and_putting_it_again_heals_it(tmp_path: Path, damaged: bytes) -> None:
    blobs = BlobStore.in_folder(tmp_path)
    digest = put(blobs, b"one")
    path_of(tmp_path, digest).write_bytes(damaged)
    with pytest.raises(DataLossError, match="corrupt"):
        blobs.get(digest)
    put(blobs, b"one")
    assert blobs.get(digest) == b"one"


def test_a_record_that_the_disk_does_not_give_is_a_loss(tmp_path: Path) -> None:
    """A folder in its place: the read fails as one of a bad sector does, with an OSError of another kind."""
    blobs = BlobStore.in_folder(tmp_path)
    digest = put(blobs, b"one")
    path_of(tmp_path, digest).unlink()
    path_of(tmp_path, digest).mkdir()
    with pytest.raises(DataLossError, match="can't be read"):
        blobs.get(digest)
    assert not blobs.is_sound(digest)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    put(BlobStore.in_folder(tmp_path), b"one")
    (tmp_path / "tmp" / "17").write_bytes(b"half a rec")
    BlobStore.in_folder(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_sweep_removes_what_is_neither_referenced_nor_held(tmp_path: Path) -> None:
    blobs = BlobStore.in_folder(tmp_path)
    kept, orphan, held = (put(blobs, name) for name in (b"kept", b"orphan", b"held"))
    (tmp_path / "ab" / "not a digest").write_text("someone's notes")
    with blobs.hold(held), blobs.hold(held):
        assert blobs.sweep(lambda digests: {kept} & set(digests)).num_removed == 1
    assert blobs.is_sound(kept) and blobs.is_sound(held) and not blobs.is_sound(orphan)
    assert blobs.sweep(lambda digests: {kept} & set(digests)).num_removed == 1
    assert not blobs.is_sound(held)
    assert (tmp_path / "ab" / "not a digest").exists()


def test_a_sweep_of_named_digests_leaves_the_others_alone(blobs: BlobStore) -> None:
    one, two = put(blobs, b"one"), put(blobs, b"two")
    assert blobs.sweep(lambda digests: set(), [one]).num_removed == 1
    assert blobs.is_sound(two) and not blobs.is_sound(one)


def test_sweeps_and_ingests_at_once_never_lose_a_record_that_was_committed(blobs: BlobStore) -> None:
    committed: set[str] = set()
    stop = threading.Event()

    def sweep() -> int:
        removed = 0
        while not stop.is_set():
            removed += blobs.sweep(lambda digests: committed & set(digests)).num_removed
        return removed

    def ingest(name: str) -> None:
        for number in range(60):
            # Every second record is the same for all threads: some find it there, some held, some swept.
            record = f"record {name if number % 2 else 'shared'} {number}".encode()
            digest = record_digest(record)
            with blobs.hold(digest):
                blobs.put(digest, record)
                time.sleep(0.002)  # the moment between blob and commit, made long enough for a sweep
                committed.add(digest)
            assert blobs.get(digest) == record

    with ThreadPoolExecutor(8) as pool:
        sweeps = [pool.submit(sweep) for _ in range(2)]
        ingests = [pool.submit(ingest, name) for name in "abcd"]
        try:
            # Orphans come up all the time, so that the sweeps have something to take.
            orphans = [put(blobs, f"orphan {number}".encode()) for number in range(100)]
            for future in ingests:
                future.result()
        finally:
            stop.set()
        assert sum(future.result() for future in sweeps) > 0
    blobs.sweep(lambda digests: committed & set(digests))
    assert len(committed) == 30 + 4 * 30 and all(blobs.is_sound(digest) for digest in committed)
    assert not any(blobs.is_sound(digest) for digest in orphans)


def test_what_a_sweep_is_removing_can_be_held_at_once_and_is_put_after_it(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = BlobStore.in_folder(tmp_path)
    digest = put(blobs, b"one")
    reached, may_go_on = threading.Event(), threading.Event()
    unlink = Path.unlink

    def slowly(path: Path, missing_ok: bool = False) -> None:
        if path == path_of(tmp_path, digest):
            reached.set()
            assert may_go_on.wait(30)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", slowly)
    sweeping = pool.submit(blobs.sweep, lambda digests: set(), [digest])
    assert reached.wait(30)

    def hold() -> None:
        with blobs.hold(digest), blobs.hold_all():
            pass

    pool.submit(hold).result(10)
    putting = pool.submit(put, blobs, b"one")
    with pytest.raises(TimeoutError):
        putting.result(0.3)
    may_go_on.set()
    assert sweeping.result().num_removed == 1 and putting.result() == digest
    assert blobs.is_sound(digest), "a put that finds the file still there would have left it to the sweep"


def test_what_was_committed_after_a_sweep_looked_into_the_catalog_stays(blobs: BlobStore) -> None:
    digest = put(blobs, b"one")

    def outdated(_: list[str]) -> set[str]:
        put(blobs, b"one")  # held, committed and let go after the look
        return set()

    assert blobs.sweep(outdated, [digest]).num_removed == 0
    assert blobs.is_sound(digest)
    assert blobs.sweep(lambda digests: set(), [digest]).num_removed == 1


def test_a_file_that_cannot_be_removed_is_named_and_holds_up_no_other(tmp_path: Path) -> None:
    blobs = BlobStore.in_folder(tmp_path)
    digests = [put(blobs, name) for name in (b"one", b"two", b"three")]
    path_of(tmp_path, digests[0]).unlink()
    path_of(tmp_path, digests[0]).mkdir()
    path_of(tmp_path, digests[1]).unlink()
    sweep = blobs.sweep(lambda _: set(), digests)
    assert (sweep.num_removed, sweep.unwanted, sweep.failed.keys()) == (1, set(digests), {digests[0]})


def test_a_name_that_is_no_digest_reaches_no_file(blobs: BlobStore) -> None:
    for name in ("../../etc/passwd", "A" * 64, "a" * 63, ""):
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            blobs.get(name)
