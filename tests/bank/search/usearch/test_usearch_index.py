from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.search.usearch import graph
from bank_service.search.usearch.graph import Graph
from bank_service.search.usearch.usearch_index import MANIFEST, UsearchIndex
from bank_service.values.vectors import KeyArray, unit
from bank_service.wire.codec import FloatArray

DIMENSION = 16


class ExactIndex:
    """Compares with every vector: the oracle."""

    def __init__(self) -> None:
        self._spaces: dict[str, dict[int, FloatArray]] = {}

    def put(self, namespace: str, keys: Sequence[int], vectors: FloatArray) -> None:
        self._spaces.setdefault(namespace, {}).update(zip(keys, unit(vectors), strict=True))

    def remove(self, namespace: str, keys: Sequence[int]) -> None:
        for key in keys:
            self._spaces.get(namespace, {}).pop(key, None)

    def search(self, namespace: str, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        space = self._spaces.get(namespace, {})
        keys = np.fromiter(space, dtype=np.int64)
        scores = np.asarray([stored @ unit(vector) for stored in space.values()], np.float32)
        best = np.lexsort((keys, -scores))[:count]
        return keys[best], scores[best]

    def size(self, namespace: str) -> int:
        return len(self._spaces.get(namespace, {}))


Index = UsearchIndex | ExactIndex


def vectors(count: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)


@pytest.fixture(params=["exact", "usearch"])
def index(request: pytest.FixtureRequest) -> Index:
    return ExactIndex() if request.param == "exact" else UsearchIndex(DIMENSION)


@pytest.fixture(params=["exhaustive", "graph"])
def usearch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> UsearchIndex:
    if request.param == "graph":
        monkeypatch.setattr(graph, "EXHAUSTIVE_SIZE", 0)
    return UsearchIndex(DIMENSION)


def test_the_nearest_come_best_first_with_their_cosines(index: Index) -> None:
    stored = np.zeros((3, DIMENSION), np.float32)
    stored[0, 0], stored[1, 1], stored[2] = 5, 2, [3, 4] + [0] * (DIMENSION - 2)
    index.put("n", [10, 11, 12], stored)
    keys, scores = index.search("n", stored[0] * 100, 3)
    assert keys.tolist() == [10, 12, 11]
    np.testing.assert_allclose(scores, [1, 0.6, 0], atol=2e-3)


def test_a_namespace_never_sees_anothers_keys(index: Index) -> None:
    index.put("few", [1, 2], vectors(2))
    index.put("many", list(range(100, 200)), vectors(100, seed=1))
    assert sorted(index.search("few", vectors(1)[0], 50)[0].tolist()) == [1, 2]
    assert min(index.search("many", vectors(1)[0], 100)[0].tolist()) == 100
    assert len(index.search("none", vectors(1)[0], 5)[0]) == 0
    assert (index.size("few"), index.size("many"), index.size("none")) == (2, 100, 0)


def test_a_search_has_its_turn_while_many_vectors_are_put(usearch: UsearchIndex) -> None:
    usearch.put("n", list(range(1000)), vectors(1000))
    put = threading.Thread(target=usearch.put, args=("n", list(range(1000, 9_000)), vectors(8_000)))
    put.start()
    num_searches = 0
    while put.is_alive():
        usearch.search("n", vectors(1)[0], 5)
        num_searches += put.is_alive()
    assert num_searches > 20 and usearch.size("n") == 9_000


def test_a_key_put_again_has_its_new_vector_only(index: Index) -> None:
    stored = vectors(2)
    index.put("n", [1], stored[:1])
    index.put("n", [1], stored[1:])
    assert index.size("n") == 1
    keys, scores = index.search("n", stored[1], 5)
    assert keys.tolist() == [1] and scores[0] > 0.99
    assert index.search("n", stored[0], 5)[1][0] < 0.9


def test_a_removed_key_is_gone_and_an_unknown_one_is_no_error(index: Index) -> None:
    stored = vectors(10)
    index.put("n", list(range(10)), stored)
    index.remove("n", [3, 777])
    index.remove("unknown", [1])
    assert 3 not in index.search("n", stored[3], 10)[0]
    assert index.size("n") == 9
    index.put("n", [3], stored[3:4])
    assert index.search("n", stored[3], 1)[0].tolist() == [3]


def test_a_namespace_emptied_answers_with_nothing(index: Index) -> None:
    index.put("n", [1, 2], vectors(2))
    index.remove("n", [1, 2])
    assert len(index.search("n", vectors(1)[0], 5)[0]) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.sets(st.integers(0, 40), min_size=1)), max_size=30))
def test_usearch_holds_what_the_oracle_holds_whatever_is_done_to_it(steps: list[tuple[str, set[int]]]) -> None:
    ours, oracle = UsearchIndex(DIMENSION), ExactIndex()
    for number, (action, keys) in enumerate(steps):
        for index in (ours, oracle):
            if action == "put":
                index.put("n", sorted(keys), vectors(len(keys), seed=number))
            else:
                index.remove("n", sorted(keys))
    target = vectors(1, seed=999)[0]
    expected, expected_scores = oracle.search("n", target, 64)
    found, scores = ours.search("n", target, 64)
    assert sorted(found.tolist()) == sorted(expected.tolist())
    np.testing.assert_allclose(np.sort(scores), np.sort(expected_scores), atol=2e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "remove", "reload"]), st.sets(st.integers(0, 40), min_size=1)),
        max_size=30,
    )
)
def test_the_places_are_those_that_usearch_counts_whatever_is_done_to_it(steps: list[tuple[str, set[int]]]) -> None:
    index = UsearchIndex(DIMENSION)
    index.put("n", [1, 2, 3], vectors(3))
    for number, (action, keys) in enumerate(steps):
        if action == "put":
            index.put("n", sorted(keys), vectors(len(keys), seed=number))
        elif action == "remove":
            index.remove("n", sorted(keys))
        else:
            with tempfile.TemporaryDirectory() as folder:
                index.save(Path(folder) / "index", "collection", 1)
                index = UsearchIndex(DIMENSION)
                assert index.load(Path(folder) / "index", "collection") == 1
        space = index._graphs["n"]
        num_places = int(space._index.stats.nodes)
        assert (space.num_nodes(), space.num_dead()) == (num_places, num_places - len(space._index))


class Uncounted:
    """An index of usearch that does not count its places: that takes as long as it is large."""

    def __init__(self, index: object) -> None:
        self._index = index

    def __getattr__(self, name: str) -> object:
        assert name != "stats"
        return getattr(self._index, name)

    def __len__(self) -> int:
        return len(self._index)  # type: ignore[arg-type]


def test_no_change_walks_through_the_graph_to_count_it() -> None:
    index = UsearchIndex(DIMENSION)
    index.put("n", [1, 2, 3], vectors(3))
    index._graphs["n"]._index = Uncounted(index._graphs["n"]._index)  # type: ignore[assignment]
    index.put("n", [3, 4], vectors(2))
    index.remove("n", [1])
    assert index.wasteful(0.1, 1) == ["n"]


def test_a_search_is_full_after_most_keys_were_removed(usearch: UsearchIndex) -> None:
    usearch.put("n", list(range(1500)), vectors(1500))
    usearch.remove("n", list(range(1400)))
    for seed in range(20):
        keys, _ = usearch.search("n", vectors(1, seed=1000 + seed)[0], 64)
        assert len(set(keys.tolist())) == 64 and keys.min() >= 1400


def test_a_large_graph_is_searched_wider_as_its_size_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGE_SIZE", 2)
    monkeypatch.setattr(graph, "HUGE_SIZE", 3)
    index = UsearchIndex(DIMENSION)
    vectors = np.eye(4, DIMENSION, dtype=np.float32)
    looked_at = []
    for size in (2, 3, 4, 3):
        index.put("n", list(range(size)), vectors[:size])
        index.remove("n", list(range(size, 4)))
        index.search("n", vectors[0], 1)
        looked_at.append(index._graphs["n"]._index.expansion_search)
    assert looked_at == [128, 256, 384, 256]


def test_the_graph_finds_nearly_all_true_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXHAUSTIVE_SIZE", 0)
    ours, oracle = UsearchIndex(DIMENSION), ExactIndex()
    for index in (ours, oracle):
        index.put("n", list(range(2000)), vectors(2000))
    found = 0
    for seed in range(50):
        target = vectors(1, seed=5000 + seed)[0]
        found += len(set(ours.search("n", target, 10)[0]) & set(oracle.search("n", target, 10)[0]))
    assert found >= 0.95 * 500


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
