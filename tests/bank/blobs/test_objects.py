"""The suite of every store of objects, run on each."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from bank_service.blobs.folder_objects import FolderObjects
from bank_service.blobs.objects import Objects
from bank_service.blobs.remote_objects import RANGE_BYTES, RemoteObjects

Opened = Callable[[], Objects]


@pytest.fixture(params=["folder", "moto", pytest.param("seaweed", marks=pytest.mark.only_test_all)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Opens the same store, each time anew."""
    if request.param == "folder":
        return lambda: FolderObjects(tmp_path / "objects", "unfinished")
    url = request.getfixturevalue("objects_url" if request.param == "moto" else "seaweed_url")
    return lambda: RemoteObjects.at(url)


@pytest.fixture
def objects(opened: Opened) -> Objects:
    return opened()


def test_a_store_that_nobody_has_written_to_is_empty(objects: Objects) -> None:
    assert list(objects.list()) == list(objects.sizes()) == []


def test_an_object_comes_back_also_from_a_store_opened_anew(opened: Opened) -> None:
    opened().put("ab/cd", b"one")
    assert opened().read("ab/cd") == b"one"


def test_a_new_object_replaces_the_old_one(objects: Objects) -> None:
    objects.put("ab/cd", b"a long one")
    objects.put("ab/cd", b"one")
    assert objects.read("ab/cd") == b"one" and dict(objects.sizes()) == {"ab/cd": 3}


def test_all_objects_are_listed_with_their_sizes_and_nothing_else(objects: Objects) -> None:
    expected = {"top": 0, "ab/cd": 1, "ab/ef": 2, "gh/ij/kl": 3}
    for name, size in expected.items():
        objects.put(name, b"x" * size)
    assert sorted(objects.list()) == sorted(expected)
    assert dict(objects.sizes()) == {name: objects.size(name) for name in expected} == expected


def test_a_removed_object_is_gone_and_the_others_are_not(objects: Objects) -> None:
    objects.put("ab/cd", b"one")
    objects.put("ab/ef", b"two")
    objects.remove("ab/cd")
    assert list(objects.list()) == ["ab/ef"] and objects.read("ab/ef") == b"two"


def test_an_object_is_added_once(opened: Opened) -> None:
    assert opened().add("ab/cd", b"one")
    assert not opened().add("ab/cd", b"two") and opened().read("ab/cd") == b"one"


def test_what_is_not_there_is_not_found(objects: Objects, tmp_path: Path) -> None:
    objects.put("ab/cd", b"one")
    for ask in (objects.read, objects.size, lambda name: objects.get_file(name, tmp_path / "out")):
        with pytest.raises(FileNotFoundError):
            ask("ab/none")
    with suppress(FileNotFoundError):  # S3 doesn't tell
        objects.remove("ab/none")
    assert list(objects.list()) == ["ab/cd"]


def test_a_file_becomes_an_object_and_an_object_a_file(objects: Objects, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"one")
    objects.put("ab/cd", b"older")
    objects.put_file("ab/cd", source)
    objects.put_file("ef/gh", source)
    objects.sync(["ab/cd", "ef/gh"])
    source.unlink()
    assert objects.read("ab/cd") == objects.read("ef/gh") == b"one"
    objects.get_file("ab/cd", copy)
    assert copy.read_bytes() == b"one"


def test_a_large_file_comes_back_whole(objects: Objects, tmp_path: Path) -> None:
    """A store may move it in parts."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(RANGE_BYTES * 2 + 1))
    objects.put_file("top", source)
    objects.get_file("top", copy)
    assert copy.read_bytes() == source.read_bytes()


def test_where_an_object_is_a_file_its_path_is_told(objects: Objects) -> None:
    objects.put("ab/cd", b"one")
    path = objects.path("ab/cd")
    assert path.read_bytes() == b"one" if path is not None else isinstance(objects, RemoteObjects)


def test_many_threads_write_one_object_and_readers_see_a_whole_one(objects: Objects) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    objects.put("ab/cd", contents[0])

    def write_and_read(content: bytes) -> bool:
        for _ in range(20):
            objects.put("ab/cd", content)
            if objects.read("ab/cd") not in contents:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, contents))
    assert list(objects.list()) == ["ab/cd"]


def test_a_folder_links_a_file_of_its_own_file_system(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    FolderObjects(tmp_path / "objects", "unfinished").put_file("ab/cd", source)
    assert (tmp_path / "objects" / "ab" / "cd").samefile(source)


def test_a_folder_keeps_no_half_written_object(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path, "unfinished")
    objects.put("ab/cd", b"one")
    with pytest.raises(TypeError):
        objects.put("ab/cd", "no bytes")  # type: ignore[arg-type]
    assert objects.read("ab/cd") == b"one" and list(objects.list()) == ["ab/cd"]


def test_what_a_killed_process_left_does_not_reach_an_object(tmp_path: Path) -> None:
    """It may be a link to a file that must never change."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / "objects" / "unfinished").mkdir(parents=True)
    os.link(precious, tmp_path / "objects" / "unfinished" / "1")
    objects = FolderObjects(tmp_path / "objects", "unfinished")
    objects.put("ab/cd", b"one")
    assert objects.read("ab/cd") == b"one" and precious.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["ab/cd", "top"])
def test_a_folder_makes_durable_the_file_then_its_name_and_every_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = tmp_path / "objects"
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    objects = FolderObjects(root, "unfinished")
    objects.put(name, b"one")
    folder = (root / name).parent
    assert synced[0] == str(root / "unfinished" / "1")
    assert set(synced[1:]) == {str(folder), str(root), str(tmp_path)}
    synced.clear()
    objects.put(name, b"two")
    assert synced == [str(root / "unfinished" / "2"), str(folder)]
    synced.clear()
    again = FolderObjects(root, "unfinished")
    again.sync([name])
    assert set(synced) == {str(folder), str(root), str(tmp_path)}
    synced.clear()
    again.add_folders(["x", "y"])
    again.put("x/z", b"three")
    assert synced == [str(root), str(root / "unfinished" / "1"), str(root / "x")]
