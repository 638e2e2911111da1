from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.search.usearch import crowds, graph
from bank_service.search.usearch.usearch_index import UsearchIndex
from bank_service.values.vectors import KeyArray, unit
from bank_service.wire.record import FloatArray

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


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "remove", "reload"]), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)))
        ),
        max_size=30,
    ),
    st.sampled_from([1, 2, 1000]),
)
def test_usearch_holds_what_the_oracle_holds_where_most_vectors_are_near_equal(
    steps: list[tuple[str, list[tuple[int, int]]]], max_different: int
) -> None:
    """Six vectors, of which four are near-equal, and one of these at most is in the graph alone."""
    drawn = vectors(3)
    drawn = np.concatenate([drawn, drawn[:1] + 0.01 * vectors(3, seed=1)])
    ours, oracle = UsearchIndex(DIMENSION), ExactIndex()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(graph, "CROWDED", 1)
        patch.setattr(crowds, "MAX_DIFFERENT", max_different)
        for number, (action, drawings) in enumerate(steps):
            chosen = dict(drawings)
            for index in (ours, oracle):
                if action == "put":
                    index.put("n", list(chosen), drawn[list(chosen.values())].reshape(-1, DIMENSION))
                elif action == "remove":
                    index.remove("n", list(chosen))
            if action == "reload":
                ours.save(Path(folder) / "index", "collection", number)
                ours = UsearchIndex(DIMENSION)
                assert ours.load(Path(folder) / "index", "collection") == number
        for target in drawn:
            expected, expected_scores = oracle.search("n", target, 64)
            found, scores = ours.search("n", target, 64)
            assert sorted(found.tolist()) == sorted(expected.tolist())
            np.testing.assert_allclose(scores, expected_scores, atol=2e-3)
            assert len(ours.search("n", target, 3)[0]) >= min(3, ours.size("n"))


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


@pytest.mark.parametrize(("noise", "num_centres"), [(None, 1), (0.0, 1), (0.0, 5), (1e-4, 1), (1e-2, 1), (1e-2, 5)])
def test_the_graph_finds_nearly_all_true_neighbours(
    monkeypatch: pytest.MonkeyPatch, noise: float | None, num_centres: int
) -> None:
    """Also of vectors that are neither equal nor near-equal, where half of the others are."""
    monkeypatch.setattr(graph, "EXHAUSTIVE_SIZE", 0)
    stored, targets = vectors(2000), vectors(50, seed=5000)
    if noise is not None:
        centres = vectors(num_centres, seed=1)
        stored[::2] = centres[np.arange(1000) % num_centres] + noise * vectors(1000, seed=2)
        targets = np.concatenate([stored[1:100:2], centres])
    ours, oracle = UsearchIndex(DIMENSION), ExactIndex()
    for index in (ours, oracle):
        index.put("n", list(range(2000)), stored)
    found = 0
    for target in targets:
        least = oracle.search("n", target, 10)[1][-1]
        found += sum(ours.search("n", target, 10)[1] >= least - 1e-3)
    assert found >= 0.95 * 10 * len(targets)
