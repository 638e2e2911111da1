"""Past, with each way of a vector store: ties, a past that ends on the way, and batches."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from bank_service.errors import OutOfRangeError
from bank_service.search import past
from bank_service.search.past import GoOn, Past
from bank_service.values.documents import Query
from tests.bank.search.collection import Collection
from tests.bank.search.test_as_of import RED

RED_PAIR = {"colour": "red"}


def then(collection: Collection, query: Query, vector: np.ndarray, as_of: int, go_on: GoOn = lambda: None) -> list[str]:
    found = Past(collection.catalog, collection.nearest).search(replace(query, as_of=as_of), vector, go_on)
    return [hit.id for hit in found.hits]


@pytest.mark.parametrize("way", ["oracle", "exact", "scan", "all"])  # a graph proposes equals by chance
def test_of_equally_near_documents_the_same_are_left_out_then_and_now(collection: Collection) -> None:
    """Of far more than are compared for a query, put in no order, some of which have changed since."""
    draw, target = random.Random(0), np.asarray([0.3, 0.1, 0.7, 0.2], np.float32)
    near, ids = np.asarray([0.3, 0.2, 0.7, 0.2]), [f"{number:03}" for number in range(60)]
    collection.fill(dict.fromkeys(draw.sample(ids, len(ids)), near), dict.fromkeys(ids, RED_PAIR))
    query = Query("n", vector=(1.0,), top_k=5, conditions=RED)  # without a filter the index proposes
    assert collection.answer(query, target) == then(collection, query, target, len(ids)) == ids[:5]
    for id in draw.sample(ids, 40):
        collection.put(id, -near if draw.random() < 0.7 else near + [0, 0, 0, draw.random() / 100], RED_PAIR)
        assert then(collection, query, target, len(ids)) == ids[:5]


def test_a_past_that_ends_during_the_search_is_not_answered_by_halves(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    target = generator.standard_normal(4).astype(np.float32)
    collection.fill({f"{number}": generator.standard_normal(4) for number in range(100)})
    query = Query("n", vector=(1.0,), top_k=3)
    expected = collection.answer(query, target)
    for id in expected:
        collection.put(id, -target)
    assert then(collection, query, target, 100) == expected
    real = past._unchanged
    num_expired = []

    def expiring(*args: Any) -> Any:
        """After the living documents were found, before the past versions are read."""
        if not num_expired:
            num_expired.append(collection.catalog.expire_history(None, 10).result())
        return real(*args)

    monkeypatch.setattr(past, "_unchanged", expiring)
    with pytest.raises(OutOfRangeError) as caught:
        then(collection, query, target, 100)
    assert num_expired and caught.value.limit == 103


def test_whether_anybody_waits_is_asked_before_each_batch(
    collection: Collection, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "BATCH", 6)
    generator = np.random.default_rng(0)
    target = generator.standard_normal(4).astype(np.float32)
    for count in (60, 30):
        collection.fill({f"{number}": generator.standard_normal(4) for number in range(count)})
    steps: list[str] = []
    real = past._cosines
    monkeypatch.setattr(past, "_cosines", lambda *args: steps.append("compared") or real(*args))
    then(collection, Query("n", vector=(1.0,), top_k=3), target, 60, lambda: steps.append("asked"))
    assert steps.count("asked") >= 5 + (5 if way in ("scan", "all") else 0), "for the past, and for the living"
    assert steps[0] == "asked" and steps.pop() == "compared", "at last those that are left"
    assert ("compared", "compared") not in pairwise(steps), "a batch each time"


def test_what_changes_between_two_batches_changes_no_answer(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "BATCH", 6)
    generator, draw = np.random.default_rng(0), random.Random(0)
    target = generator.standard_normal(4).astype(np.float32)
    for count in (60, 30):
        collection.fill({f"{number}": generator.standard_normal(4) for number in range(count)})
    query = Query("n", vector=(1.0,), top_k=10)
    expected = then(collection, query, target, 90)
    assert len(expected) == 10
    left = [*expected, *(f"{number}" for number in range(60) if f"{number}" not in expected)]
    num_changed = 0

    def change() -> None:
        """One of the answer first, then another, a third of them deleted, the rest put far away or where it's best."""
        nonlocal num_changed
        if left:
            id = left.pop(0)
            if draw.random() < 1 / 3:
                collection.delete(id)
            else:
                collection.put(id, draw.choice([target, -target]))
            num_changed += 1

    assert then(collection, query, target, 90, change) == expected
    assert num_changed >= 5
    assert set(collection.answer(query, target)) != set(expected)
