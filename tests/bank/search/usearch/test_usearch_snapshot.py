"""The snapshots of a usearch index on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from bank_service.search.usearch.graph import Graph
from bank_service.search.usearch.usearch_index import MANIFEST, UsearchIndex
from tests.bank.search.usearch.test_usearch_index import DIMENSION, vectors


def test_a_snapshot_brings_back_every_namespace(tmp_path: Path) -> None:
    saved = UsearchIndex(DIMENSION)
    saved.put("a/../b", [1, 2, 3], vectors(3))
    saved.put("c", [4], vectors(1, seed=1))
    saved.remove("a/../b", [2])
    for sequence in (5, 9):  # the second takes the first one's place
        saved.save(tmp_path / "index", "collection", sequence)
    loaded = UsearchIndex(DIMENSION)
    assert loaded.load(tmp_path / "index", "collection") == 9
    assert loaded.search("a/../b", vectors(3)[2], 9)[0].tolist() == saved.search("a/../b", vectors(3)[2], 9)[0].tolist()
    assert (loaded.size("a/../b"), loaded.size("c")) == (2, 1)
    loaded.put("c", [5], vectors(1, seed=2))
    assert loaded.size("c") == 2


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


Change = Callable[[UsearchIndex], None]
CHANGES: dict[str, Change] = {
    "put": lambda index: index.put("b", [9], vectors(1)),
    "update": lambda index: index.put("b", [1], vectors(1, seed=5)),
    "remove": lambda index: index.remove("b", [1]),
    "take": lambda index: index.take("b", small_index()),
    "nothing": lambda index: index.remove("b", [777]),
}


def small_index() -> UsearchIndex:
    index = UsearchIndex(DIMENSION)
    for number, namespace in enumerate("abc"):
        index.put(namespace, [1, 2, 3], vectors(3, seed=number))
        index.remove(namespace, [2])
    return index


def answers(index: UsearchIndex) -> list[list[int]]:
    return [index.search(namespace, vectors(1, seed=7)[0], 9)[0].tolist() for namespace in "abc"]


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_snapshot_writes_what_has_changed_and_keeps_the_other_files(
    tmp_path: Path, change: str, loaded: bool
) -> None:
    folder, index = tmp_path / "index", small_index()
    index.save(folder, "collection", 1)
    if loaded:
        index = UsearchIndex(DIMENSION)
        assert index.load(folder, "collection") == 1
    for sequence in (2, 3):  # the second has files that the first wrote and files that it kept
        before = files_in(folder)
        CHANGES[change](index)
        index.save(folder, "collection", sequence)
        after = files_in(folder)
        num_changed = 0 if change == "nothing" or (change, sequence) == ("remove", 3) else 1
        assert len(after) == 4 and len(after.keys() - before.keys()) == num_changed
        again = UsearchIndex(DIMENSION)
        assert again.load(folder, "collection") == sequence and answers(again) == answers(index)
    index.save(tmp_path / "other", "collection", 4)
    again = UsearchIndex(DIMENSION)
    assert again.load(tmp_path / "other", "collection") == 4 and answers(again) == answers(index)


@pytest.mark.parametrize("point", ["save", "replace", "unlink"])
def test_a_crash_in_a_snapshot_leaves_the_one_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    folder, crashed, index = tmp_path / "index", tmp_path / "crashed", small_index()
    index.save(folder, "collection", 1)
    answer = answers(index)
    owner = {"save": Graph, "replace": os, "unlink": Path}[point]
    act = getattr(owner, point)

    def copied_first(*args: object) -> object:
        if not crashed.exists():
            shutil.copytree(folder, crashed)  # as a kill leaves it
        return act(*args)

    index.put("b", [9], vectors(1))
    with monkeypatch.context() as patch:
        patch.setattr(owner, point, copied_first)
        index.save(folder, "collection", 2)
    again = UsearchIndex(DIMENSION)
    assert again.load(crashed, "collection") == (2 if point == "unlink" else 1)
    assert answers(again) == (answers(index) if point == "unlink" else answer)
    again.put("b", [10], vectors(1))
    again.save(crashed, "collection", 3)
    named = json.loads((crashed / MANIFEST).read_text())["files"].values()
    assert files_in(crashed).keys() == {name for name, _ in named} | {MANIFEST}, "what the crash left is gone"
    again = UsearchIndex(DIMENSION)
    assert again.load(crashed, "collection") == 3 and again.size("b") == (4 if point == "unlink" else 3)


def test_a_snapshot_that_fails_leaves_the_one_before_and_no_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, index = tmp_path / "index", small_index()
    index.save(folder, "collection", 1)
    before = files_in(folder)
    index.put("a", [9], vectors(1))
    (folder / "77.usearch").write_bytes(b"what a crash left: it goes first, as the disk may be full")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):

        def refused(*args: object) -> None:
            raise OSError("gone" if files_in(folder) == before else "left")

        patch.setattr(Graph, "save", refused)
        index.save(folder, "collection", 2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no manifest"):
        patch.setattr(os, "replace", Mock(side_effect=OSError("no manifest")))
        index.save(folder, "collection", 2)
    assert files_in(folder) == before
    index.save(folder, "collection", 3)
    loaded = UsearchIndex(DIMENSION)
    assert loaded.load(folder, "collection") == 3 and answers(loaded) == answers(index)


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "missing", "collection", "dimension"])
def test_a_snapshot_that_is_damaged_or_anothers_is_not_used(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "index"
    saved = UsearchIndex(DIMENSION)
    saved.put("n", [1, 2, 3], vectors(3))
    saved.save(folder, "collection", 5)
    (file,) = folder.glob("*.usearch")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "manifest":
        (folder / MANIFEST).write_text("{")
    elif damage == "missing":
        file.unlink()
    elif damage == "dimension":
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"dimension": 3}))
    loaded = UsearchIndex(DIMENSION)
    assert loaded.load(folder, "another collection" if damage == "collection" else "collection") == 0
    assert loaded.size("n") == 0
