"""The conformance suite of vector stores: each test runs on every implementation, in each of its ways."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bank_service.search.usearch import graph
from bank_service.values.documents import Query, Retrieval
from bank_service.values.filters import Condition, Operator
from bank_service.wire.record import FloatArray
from tests.bank.search.collection import DIMENSION, Collection

COLOURS = ("red", "green", "blue")
Expected = Callable[[dict[str, str]], bool]
CASES: list[tuple[Condition, Expected]] = [
    (Condition("colour", Operator.EQUALS, ("red",)), lambda found: found["colour"] == "red"),
    (Condition("colour", Operator.NOT_EQUALS, ("red", "blue")), lambda found: found["colour"] == "green"),
    (Condition("rare", Operator.PRESENT), lambda found: "rare" in found),
    (Condition("rare", Operator.ABSENT), lambda found: "rare" not in found),
    (Condition("colour", Operator.EQUALS, ("black",)), lambda found: False),
]


def drawn(generator: np.random.Generator) -> FloatArray:
    return generator.standard_normal(DIMENSION).astype(np.float32)


def ranked(vectors: dict[str, FloatArray], target: FloatArray) -> list[str]:
    return sorted(vectors, key=lambda id: -float(vectors[id] @ target / np.linalg.norm(vectors[id])))


def test_the_nearest_come_whatever_their_length(collection: Collection) -> None:
    for id, vector in {"x": [5, 0, 0, 0], "y": [0, 2, 0, 0], "both": [3, 4, 0, 0]}.items():
        collection.put(id, np.asarray(vector, np.float32))
    assert collection.ids(np.asarray([100, 0, 0, 0], np.float32), 3) == ["x", "both", "y"]


def test_a_namespace_never_sees_anothers_documents(collection: Collection) -> None:
    generator = np.random.default_rng(0)
    target = drawn(generator)
    for number in range(80):
        collection.put(f"{number}", target, namespace="many")
    for id in "ab":
        collection.put(id, -target, namespace="few")
    assert sorted(collection.ids(target, 50, namespace="few")) == ["a", "b"]
    assert not {"a", "b"} & set(collection.ids(-target, 64, namespace="many"))
    assert collection.ids(target, 5, namespace="none") == []


@pytest.mark.parametrize("way", ["oracle", "exact", "scan", "postgres"])  # the others differ with filters only
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "delete", "other"]), st.integers(0, 12)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_after_any_changes_the_documents_are_those_of_the_catalog(
    way: str, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], seed: int
) -> None:
    """Without filters, so usearch's bounds do not matter."""
    generator = np.random.default_rng(seed)
    collection = Collection(tmp_path_factory.mktemp("collection"), way)
    alive: dict[str, FloatArray] = {}
    target = drawn(generator)
    for action, number in steps:
        if action == "other":
            collection.put(f"{number}", target, namespace="other")
        elif action == "put":
            alive[f"{number}"] = drawn(generator)
            collection.put(f"{number}", alive[f"{number}"])
        elif alive.pop(f"{number}", None) is not None:
            collection.delete(f"{number}")
        assert collection.ids(target, 5) == ranked(alive, target)[:5]
    collection.close()


def test_a_filtered_search_finds_the_nearest_that_match(collection: Collection) -> None:
    generator, draw = np.random.default_rng(0), random.Random(0)
    vectors = {f"{number}": drawn(generator) for number in range(600)}
    pairs = {id: {"colour": draw.choice(COLOURS)} for id in vectors}
    for number in range(0, 600, 40):
        pairs[f"{number}"]["rare"] = "yes"
    collection.fill(vectors, pairs)
    target = drawn(generator)
    for condition, expected in CASES:
        matching = {id: vectors[id] for id in vectors if expected(pairs[id])}
        for count in (1, 10, 64):
            assert collection.ids(target, count, (condition,)) == ranked(matching, target)[:count]


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_many_equal_or_near_equal_vectors_hide_no_other(
    collection: Collection, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    """The graph of a large namespace, where 300 of 400 documents are copies. The others find themselves."""
    monkeypatch.setattr(graph, "EXHAUSTIVE_SIZE", 0)
    generator = np.random.default_rng(0)
    copied = drawn(generator)
    vectors = {f"copy {number}": copied + noise * drawn(generator) for number in range(300)}
    vectors |= {f"{number}": drawn(generator) for number in range(100)}
    order = generator.permutation(list(vectors)).tolist()
    collection.fill({id: vectors[id] for id in order}, {id: {"colour": COLOURS[len(id) % 2]} for id in vectors})
    before = collection.nearest.sequence

    def missed() -> list[str]:
        others = [f"{number}" for number in range(0, 100, 7)]
        same = {id: (Condition("colour", Operator.EQUALS, (COLOURS[len(id) % 2],)),) for id in others}
        by_vector = [id for id in others if collection.ids(vectors[id], 1) != [id]]
        filtered = [id for id in others if collection.ids(vectors[id], 1, same[id]) != [id]]
        past = [id for id in others if collection.ids(vectors[id], 1, as_of=before) != [id]]
        hybrid = Query("n", "nowhere", top_k=1, retrieval=Retrieval.HYBRID)
        joined = [id for id in others if collection.answer(hybrid, vectors[id]) != [id]]
        return [*by_vector, *filtered, *past, *joined]

    assert missed() == []
    for number in range(0, 300, 2):
        collection.delete(f"copy {number}")
        del vectors[f"copy {number}"]
    assert missed() == []
    assert set(collection.ids(copied, 400)) == set(vectors)


def test_as_of_finds_what_has_not_changed_since(collection: Collection) -> None:
    """Of so many documents that neither all are proposed nor the first proposals are enough."""
    generator, draw = np.random.default_rng(0), random.Random(0)
    vectors = {f"{number}": drawn(generator) for number in range(600)}
    began = {f"{number}": number + 1 for number in range(600)}
    pairs = {id: {"parity": str(began[id] % 2)} for id in vectors}
    collection.fill(vectors, pairs)
    for newest in (600, 800):
        changed = {id: drawn(generator) for id in draw.sample(sorted(vectors), 200)}
        for sequence, id in enumerate(changed, newest + 1):
            vectors[id], began[id], pairs[id] = changed[id], sequence, {"parity": str(sequence % 2)}
        collection.fill(changed, pairs)
    assert collection.nearest.sequence == 1000
    target = drawn(generator)
    even = Condition("parity", Operator.EQUALS, ("0",))
    for as_of in (400, 600, 700, 1000):
        for conditions in ((), (even,)):
            expected = {id: vectors[id] for id in vectors if began[id] <= as_of and began[id] % 2 < 2 - len(conditions)}
            assert len(expected) > 64 and (len(expected) == 600) == (as_of == 1000 and not conditions)
            for count in (1, 10, 64):
                assert collection.ids(target, count, conditions, as_of) == ranked(expected, target)[:count]


def test_what_the_store_reflects_is_told(collection: Collection) -> None:
    target = np.ones(DIMENSION, np.float32)
    sequences = [collection.put(id, target).sequence for id in "abc"]
    assert collection.nearest.sequence == sequences[-1]
    collection.run(collection.nearest.reach(sequences[0]))  # long since
    collection.run(collection.nearest.keep_up(sequences[-1]))
    with collection.catalog.view() as view:
        assert collection.nearest.nearest(view, "n", target, 9).sequence == sequences[-1]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_store_that_starts_again_has_all_also_what_changed_meanwhile(tmp_path: Path, way: str, is_lost: bool) -> None:
    generator = np.random.default_rng(0)
    collection = Collection(tmp_path, way)
    vectors = {f"{number}": drawn(generator) for number in range(60)}
    collection.fill(vectors)
    collection.delete("7")
    collection.run(collection.nearest.stop())
    collection.catalog.delete("n", "9", None).result()  # while nothing follows the catalog
    collection.close()
    if is_lost:
        collection.lose_derived_data()
    collection.open()
    vectors["8"] = target = drawn(generator)
    collection.put("8", target)
    del vectors["7"], vectors["9"]
    assert collection.ids(target, 64) == ranked(vectors, target)
    collection.close()


def test_erasing_costs_no_document_that_lives(collection: Collection) -> None:
    generator = np.random.default_rng(0)
    vectors = {f"{number}": drawn(generator) for number in range(100)}
    collection.fill(vectors)
    collection.put("0", vectors["0"], namespace="other")
    for number in range(0, 60, 3):
        collection.delete(f"{number}", purge=True)
        del vectors[f"{number}"]
    collection.run(collection.nearest.erase({"n", "unknown"}))
    target = drawn(generator)
    assert collection.ids(target, 100) == ranked(vectors, target)
    assert collection.ids(target, 100, namespace="other") == ["0"]


def test_searches_go_on_while_others_write(collection: Collection) -> None:
    """Each is full, and none finds what was deleted before it began."""
    generator = np.random.default_rng(0)
    names = [f"{number}" for number in range(100)]
    collection.fill({name: drawn(generator) for name in names}, dict.fromkeys(names, {"colour": "red"}))
    target = drawn(generator)
    deleted: set[int] = set()
    with collection.catalog.view() as view:
        key_of = {item.document.id: item.key for item in view.after_key(0, 100)}
    failures: list[str] = []
    stop = threading.Event()

    def search() -> None:
        red = (Condition("colour", Operator.EQUALS, ("red",)),)
        while not stop.is_set():
            for conditions in ((), red):
                before = set(deleted)
                with collection.catalog.view() as view:
                    keys = collection.nearest.nearest(view, "n", target, 40, conditions).keys
                if len(set(keys)) < 40 or before & set(keys):
                    failures.append(f"{len(set(keys))} keys, gone before: {before & set(keys)}")

    searching = [threading.Thread(target=search) for _ in range(2)]
    for thread in searching:
        thread.start()
    for name in names[:50]:
        collection.delete(name)
        deleted.add(key_of[name])
        collection.put(f"new {name}", drawn(generator), {"colour": "red"})
    stop.set()
    for thread in searching:
        thread.join()
    assert not failures
