"""The arena: what it holds, what it lets go, and what it leaves behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from regrad_vllm.serve.arena.arena import Arena, ArenaFull
from regrad_vllm.serve.arena.folders import FOLDER_PREFIX
from regrad_vllm.serve.arena.record_files import ArenaCorrupt, ArenaError, read_record
from tests.small_disk import small_disk


def record(number: int, size: int = 100) -> tuple[str, bytes]:
    data = (f"record {number} ".encode() * size)[:size]
    return hashlib.sha256(data).hexdigest(), data


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path, 1000)
    yield made
    made.close()


def fill(arena: Arena, numbers: range) -> None:
    for number in numbers:
        with arena.hold() as hold:
            if hold.take([record(number)[0]]):
                hold.put(*record(number))


def holds(arena: Arena, number: int) -> bool:
    return (arena.folder / record(number)[0]).exists()


def test_a_worker_reads_what_the_server_put(arena: Arena) -> None:
    digest, data = record(1)
    with arena.hold() as hold:
        assert hold.take([digest, digest]) == [digest]
        hold.put(digest, data)
        assert read_record(arena.folder, digest) == data
    assert arena.hold().take([digest]) == []


def test_its_records_are_told_with_their_uses_the_latest_first(arena: Arena) -> None:
    fill(arena, range(3))
    with arena.hold() as hold:
        assert hold.take([record(1)[0]]) == []
        told = arena.records(2)
        assert [(one.gradient_digest, one.num_bytes, one.num_uses, one.num_holds) for one in told] == [
            (record(1)[0], 100, 2, 1), (record(2)[0], 100, 1, 0),
        ]  # fmt: skip
    damaged, other = arena.hold(), arena.hold()
    assert damaged.take([record(1)[0]]) == other.take([record(1)[0]]) == []
    damaged.release(discard=True)
    assert [one.gradient_digest for one in arena.records(9)] == [record(2)[0], record(0)[0]], "nobody gets it again"
    other.release()


def test_the_least_recently_used_goes_first(arena: Arena) -> None:
    fill(arena, range(10))
    fill(arena, range(0, 1))  # 0 is used again
    fill(arena, range(10, 12))
    assert [number for number in range(12) if not holds(arena, number)] == [1, 2]
    figures = arena.figures()
    assert (figures.used_bytes, figures.num_records, figures.num_evictions) == (1000, 10, 2)


def test_a_held_record_stays_until_its_last_hold_goes(arena: Arena) -> None:
    fill(arena, range(10))
    first, second = arena.hold(), arena.hold()
    assert first.take([record(0)[0]]) == second.take([record(0)[0]]) == []
    first.release()
    first.release()  # once is enough, twice does no harm
    fill(arena, range(10, 19))
    assert holds(arena, 0)
    second.release()
    fill(arena, range(19, 30))
    assert not holds(arena, 0)
    assert arena.figures().num_holds == arena.figures().num_held == 0


def test_an_arena_full_of_held_records_refuses_and_keeps_what_it_has(arena: Arena) -> None:
    with arena.hold() as hold:
        for number in range(10):
            hold.put(*record(number))
        with pytest.raises(ArenaFull, match="--regrad-arena-bytes"):
            arena.hold().put(*record(10))
        assert all(holds(arena, number) for number in range(10))
    fill(arena, range(10, 11))
    assert holds(arena, 10)


def test_a_record_larger_than_the_arena_is_refused(arena: Arena) -> None:
    with pytest.raises(ArenaFull, match="must fit"), arena.hold() as hold:
        hold.put(*record(1, 1001))


def test_bytes_that_are_not_what_their_digest_says_are_never_published(arena: Arena) -> None:
    with pytest.raises(ArenaCorrupt), arena.hold() as hold:
        hold.put(record(1)[0], b"something else")
    assert not holds(arena, 1) and arena.figures().used_bytes == 0


def test_a_damaged_file_is_noticed_discarded_and_fetched_anew(arena: Arena) -> None:
    digest, data = record(1)
    hold = arena.hold()
    hold.put(digest, data)
    path = arena.folder / digest
    path.chmod(0o600)
    path.write_bytes(b"x" + data[1:])
    with pytest.raises(ArenaCorrupt, match=digest):
        read_record(arena.folder, digest)
    hold.release(discard=True)
    assert not path.exists()
    with arena.hold() as again:
        assert again.take([digest]) == [digest]
        again.put(digest, data)
        assert read_record(arena.folder, digest) == data


def test_a_discarded_record_stays_for_those_who_hold_it_but_for_no_others(arena: Arena) -> None:
    digest, data = record(1)
    reader = arena.hold()
    reader.put(digest, data)
    finder = arena.hold()
    finder.take([digest])
    finder.release(discard=True)
    assert holds(arena, 1)
    late = arena.hold()
    assert late.take([digest]) == [digest]
    late.put(digest, data)  # whole again
    reader.release()
    assert holds(arena, 1) and arena.figures().used_bytes == len(data)
    late.release()
    assert arena.hold().take([digest]) == []


def test_a_record_that_is_not_there_says_so(arena: Arena) -> None:
    with pytest.raises(ArenaError, match="must hold"):
        read_record(arena.folder, record(1)[0])


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "0" * 63])
def test_a_name_that_is_no_digest_is_refused(arena: Arena, digest: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        read_record(arena.folder, digest)


def test_many_threads_leave_sound_books(arena: Arena) -> None:
    failures: list[Exception] = []

    def work(seed: int) -> None:
        for step in range(200):
            wanted = [record((seed * 7 + step * k) % 14) for k in (1, 3)]
            with arena.hold() as hold:
                try:
                    missing = hold.take([digest for digest, _ in wanted])
                    for digest, data in wanted:
                        if digest in missing:
                            missing.remove(digest)
                            hold.put(digest, data)
                        assert read_record(arena.folder, digest) == data
                except ArenaFull:
                    continue
                except Exception as error:  # noqa: BLE001  # handed to the main thread
                    failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = arena.figures()
    files = [path for path in arena.folder.iterdir() if len(path.name) == 64]
    assert failures == []
    assert figures.num_held == figures.num_holds == 0
    assert figures.used_bytes == sum(path.stat().st_size for path in files) <= 1000
    assert figures.num_evictions > 100


def test_the_next_start_sweeps_what_a_killed_server_left(tmp_path: Path) -> None:
    code = (
        "import sys, time, hashlib\n"
        "from regrad_vllm.serve.arena.arena import Arena\n"
        "arena = Arena.open(sys.argv[1], 1000)\n"
        "arena.hold().put(hashlib.sha256(b'x').hexdigest(), b'x')\n"
        "print(arena.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip())
    living = Arena.open(tmp_path, 1000)
    assert folder.is_dir() and len(list(folder.iterdir())) == 2, "the owner lives: its folder must stay"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert folder.is_dir()
    after = Arena.open(tmp_path, 1000)
    assert not folder.exists()
    assert {path for path in tmp_path.glob(FOLDER_PREFIX + "*")} == {living.folder, after.folder}
    living.close()
    after.close()
    assert list(tmp_path.glob(FOLDER_PREFIX + "*")) == []


def test_a_put_that_comes_after_its_request_was_cancelled_holds_nothing(arena: Arena) -> None:
    hold, other = arena.hold(), arena.hold()
    other.put(*record(2))
    hold.release()
    for number in (1, 2):
        with pytest.raises(ArenaError, match="released"):
            hold.put(*record(number))
    with pytest.raises(ArenaError, match="released"):
        hold.take([record(2)[0]])
    other.release()
    assert arena.figures().num_held == arena.figures().num_holds == 0
    fill(arena, range(10, 30))
    assert not holds(arena, 1) and not holds(arena, 2)


def test_each_user_has_a_sweep_lock_of_his_own_and_follows_no_link(tmp_path: Path) -> None:
    lock = tmp_path / f".regrad-arena.{os.getuid()}.sweep"
    Arena.open(tmp_path, 1000).close()
    assert lock.is_file()
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArenaError, match="can't be made"):
        Arena.open(tmp_path, 1000)
    assert not (tmp_path / "elsewhere").exists()


def test_another_users_folder_is_not_swept(tmp_path: Path) -> None:
    foreign = tmp_path / (FOLDER_PREFIX + "foreign")
    foreign.mkdir()
    try:
        os.chown(foreign, os.getuid() + 1, -1)
    except PermissionError:
        pytest.skip("giving a folder away takes root")
    Arena.open(tmp_path, 1000).close()
    assert foreign.is_dir(), "its owner may be about to lock it"


def test_a_closed_arena_refuses(tmp_path: Path) -> None:
    arena = Arena.open(tmp_path, 1000)
    hold = arena.hold()
    hold.put(*record(1))
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        arena.hold().take([record(1)[0]])
    hold.release()


def test_a_file_system_smaller_than_the_arena_is_a_smaller_arena() -> None:
    with small_disk("128k") as folder:
        small = Arena.open(folder, 2**30)
        for number in range(10):
            with small.hold() as hold:
                hold.put(*record(number, 30_000))
        figures = small.figures()
        assert 0 < figures.num_records < 10 and figures.num_evictions == 10 - figures.num_records
        held = small.hold()
        with pytest.raises(ArenaFull, match="file system .* is full"):
            for number in range(10):
                held.put(*record(number, 30_000))
        held.release()
        small.close()
