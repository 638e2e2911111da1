"""Small namespaces are compared vector by vector, within bounds on memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import open_catalog
from bank_service.search.usearch import graph
from bank_service.search.usearch.exact_vectors import ExactVectors, _Space
from bank_service.values.documents import Document, Gradient, Query
from bank_service.wire.record import FloatArray
from tests.bank.catalog.test_catalog import IDENTITY
from tests.bank.search.collection import DIMENSION, Collection


def put(catalog: Catalog, id: str, vector: FloatArray, namespace: str = "n") -> int:
    content = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
    document = Document(namespace, id, "", content.hex())
    return catalog.put(document, Gradient("0" * 64, 1, 1, False, content), None).result().stored.key


def test_neighbours_that_float16_can_not_tell_apart_come_in_their_true_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more of them than the index is asked for: by float16 alone the nearest are found by luck."""
    target = np.asarray([1, 0, 0, 0], np.float32)
    numbers = np.random.default_rng(0).permutation(400).tolist()
    angles = {f"{number:03}": np.pi / 4 + 7e-7 * number for number in numbers}

    def found(exact_below: int) -> list[str]:
        folder = tmp_path / f"{exact_below}"
        folder.mkdir()
        collection = Collection(folder, exact_below=exact_below)
        collection.fill({id: np.asarray([np.cos(angle), np.sin(angle), 0, 0]) for id, angle in angles.items()})
        answer = collection.answer(Query("n", vector=(1.0,), top_k=3), target)
        collection.close()
        return answer

    right = ["000", "001", "002"]
    assert found(399) == found(400) == right
    monkeypatch.setattr(graph, "CROWDED", 1000)  # all are in the graph
    assert found(398) != right, "else this test shows nothing"


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_the_vectors_are_the_catalogs_after_any_changes(
    tmp_path_factory: object, steps: list[tuple[bool, int]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    folder: Path = tmp_path_factory.mktemp("catalog")  # type: ignore[attr-defined]
    catalog, exact = open_catalog(folder, IDENTITY), ExactVectors(DIMENSION, max_vectors=5)
    alive: dict[str, FloatArray] = {}
    target = generator.standard_normal(DIMENSION).astype(np.float32)
    for number, (is_put, id) in enumerate(steps):
        if is_put:
            alive[str(id)] = generator.standard_normal(DIMENSION).astype(np.float32)
            put(catalog, str(id), alive[str(id)])
        elif alive.pop(str(id), None) is not None:
            catalog.delete("n", str(id), None).result()
        if number % 3 == 0:
            put(catalog, str(id), target, namespace="other")  # another that takes the first one's room
            with catalog.view() as view:
                exact.search(view, "other", target, 5)
        with catalog.view() as view:
            keys = exact.search(view, "n", target, 5)
            ids = {item.key: item.id for item in view.candidates(keys)}
        scores = {id: vector @ target / np.linalg.norm(vector) for id, vector in alive.items()}
        assert [ids[key] for key in keys] == sorted(scores, key=lambda id: -scores[id])[:5]
    catalog.close()


def test_a_search_looks_at_its_own_namespace_alone_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, exact = open_catalog(tmp_path, IDENTITY), ExactVectors(DIMENSION, max_vectors=30 * 16)
    vector = np.ones(DIMENSION, np.float32)
    room = _Space.room.fget
    assert room is not None
    asked: list[_Space] = []

    def counted(space: _Space) -> int:
        asked.append(space)
        return int(room(space))

    monkeypatch.setattr(_Space, "room", property(counted))

    def search(namespace: str) -> None:
        asked.clear()
        with catalog.view() as view:
            assert len(exact.search(view, namespace, vector, 1)) == 1
        assert len(set(map(id, asked))) <= 1

    for number in range(50):
        put(catalog, "d", vector, f"n{number}")
    for number in range(50):
        search(f"n{number}")
        assert exact._num_places == sum(map(room, exact._spaces.values()))
    assert list(exact._spaces) == [f"n{number}" for number in range(20, 50)], "the longest unused ones are forgotten"
    for number in range(40):  # one that grows, out of its first room and again
        put(catalog, str(number), np.eye(DIMENSION, dtype=np.float32)[number % DIMENSION], "n49")
        search("n49")
        assert exact._num_places == sum(map(room, exact._spaces.values())) <= 30 * 16
    assert len(exact._spaces) == 27 and room(exact._spaces["n49"]) == 64
    catalog.close()
