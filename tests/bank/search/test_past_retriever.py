"""PastRetriever in each of its ways: ties, a past that ends on the way, and batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.factory import open_catalog
from bank_service.errors import OutOfRangeError
from bank_service.search import past, retrieval
from bank_service.search.exact_vectors import ExactVectors
from bank_service.search.past import PastRetriever
from bank_service.search.retrieval import Retriever
from bank_service.search.usearch_index import UsearchIndex
from bank_service.values.documents import Document, Gradient, Query
from tests.bank.catalog.test_catalog import IDENTITY
from tests.bank.search.test_as_of import RED

WAYS = ("exact", "scan", "proposals", "all")


@dataclass
class Collection:
    """A catalog, its index and who answers from them, in one of WAYS."""

    catalog: Catalog
    index: UsearchIndex
    retriever: Retriever
    past: PastRetriever

    def put(self, id: str, vector: np.ndarray) -> int:
        """The sequence of the change."""
        content = (vector / np.linalg.norm(vector)).astype("<f4")
        gradient = Gradient("0" * 64, 1, 1, False, content.tobytes())
        stored = self.catalog.put(Document("n", id, "", "text", {"colour": "red"}), gradient, None).result().stored
        self.index.put("n", [stored.key], content[None])
        return stored.sequence

    def now(self, query: Query, vector: np.ndarray) -> list[str]:
        with self.catalog.view() as view:
            found = self.retriever.find(view, query, vector, 10**6)
            return [hit.id for hit in view.hits(found.scores, include_text=False)]

    def then(self, query: Query, vector: np.ndarray, as_of: int) -> list[str]:
        return [hit.id for hit in self.past.search(replace(query, as_of=as_of), vector).hits]


@pytest.fixture
def collection(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collection]:
    for module in (past, retrieval):
        monkeypatch.setattr(module, "SCAN_SIZE", {"proposals": 0, "all": 0}.get(way, 5000))
        monkeypatch.setattr(module, "MAX_PROPOSALS", 0 if way == "all" else 20_000)
    dimension = IDENTITY.embedding_dimension
    catalog, index = open_catalog(tmp_path, IDENTITY, history_seconds=3600), UsearchIndex(dimension)
    exact, exact_below = ExactVectors(dimension), 10_000 if way == "exact" else 0
    yield Collection(
        catalog, index, Retriever(index, exact, exact_below), PastRetriever(catalog, index, exact, exact_below)
    )
    catalog.close()


@pytest.mark.parametrize("way", ["exact", "scan", "all"])  # what the index proposes of equals is chance
def test_of_equally_near_documents_the_same_are_left_out_then_and_now(collection: Collection) -> None:
    """Of far more than are compared for a query, put in no order, some of which have changed since."""
    draw, target = random.Random(0), np.asarray([0.3, 0.1, 0.7, 0.2], np.float32)
    near, ids = np.asarray([0.3, 0.2, 0.7, 0.2]), [f"{number:03}" for number in range(60)]
    for id in draw.sample(ids, len(ids)):
        collection.put(id, near)
    query = Query("n", vector=(1.0,), top_k=5, conditions=RED)  # without a filter the index proposes
    assert collection.now(query, target) == collection.then(query, target, len(ids)) == ids[:5]
    for id in draw.sample(ids, 40):
        collection.put(id, -near if draw.random() < 0.7 else near + [0, 0, 0, draw.random() / 100])
        assert collection.then(query, target, len(ids)) == ids[:5]


@pytest.mark.parametrize("way", WAYS)
def test_a_past_that_ends_during_the_search_is_not_answered_by_halves(
    collection: Collection, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    target = generator.standard_normal(4).astype(np.float32)
    for number in range(100):
        collection.put(f"{number}", generator.standard_normal(4))
    query = Query("n", vector=(1.0,), top_k=3)
    expected = collection.now(query, target)
    for id in expected:
        collection.put(id, -target)
    asked = replace(query, as_of=100)
    collection.past.check(asked)
    assert collection.then(query, target, 100) == expected

    # Just before the last look at the catalog, whichever the way has.
    owner, name = {
        "exact": (ExactVectors, "search"),
        "scan": (past, "_unchanged"),
        "proposals": (UsearchIndex, "search"),
        "all": (past, "_unchanged"),
    }[way]
    real = getattr(owner, name)
    num_expired = []

    def expiring(*args: object) -> object:
        if not num_expired:
            num_expired.append(collection.catalog.expire_history(None, 10).result())
        return real(*args)

    monkeypatch.setattr(owner, name, expiring)
    with pytest.raises(OutOfRangeError) as caught:
        collection.past.search(asked, target)
    assert num_expired and caught.value.limit == 103


@pytest.mark.parametrize("way", WAYS)
def test_whether_anybody_waits_is_asked_before_each_batch(
    collection: Collection, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "BATCH", 6)
    generator = np.random.default_rng(0)
    target = generator.standard_normal(4).astype(np.float32)
    for number in [*range(60), *range(30)]:
        collection.put(f"{number}", generator.standard_normal(4))
    asked = Query("n", vector=(1.0,), top_k=3, as_of=60)
    steps: list[str] = []
    real = past._cosines
    monkeypatch.setattr(past, "_cosines", lambda *args: steps.append("compared") or real(*args))
    collection.past.search(asked, target, lambda: steps.append("asked"))
    assert steps.count("asked") >= 5 + (5 if way in ("scan", "all") else 0), "for the past, and for the living"
    assert steps[0] == "asked" and steps.pop() == "compared", "at last those that are left"
    assert ("compared", "compared") not in pairwise(steps), "a batch each time"


@pytest.mark.parametrize("way", WAYS)
def test_what_changes_between_two_batches_changes_no_answer(
    collection: Collection, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "BATCH", 6)
    generator, draw = np.random.default_rng(0), random.Random(0)
    target = generator.standard_normal(4).astype(np.float32)
    for number in [*range(60), *range(30)]:
        collection.put(f"{number}", generator.standard_normal(4))
    asked = Query("n", vector=(1.0,), top_k=10, as_of=90)
    expected = [hit.id for hit in collection.past.search(asked, target).hits]
    assert len(expected) == 10
    left = [*expected, *(f"{number}" for number in range(60) if f"{number}" not in expected)]
    num_changed = 0

    def change() -> None:
        """One of the answer first, then another, a third of them deleted, the rest put far away or where it's best."""
        nonlocal num_changed
        if left:
            id = left.pop(0)
            if draw.random() < 1 / 3:
                collection.catalog.delete("n", id, None).result()
            else:
                collection.put(id, draw.choice([target, -target]))
            num_changed += 1

    assert [hit.id for hit in collection.past.search(asked, target, change).hits] == expected
    assert num_changed >= 5
    assert set(collection.now(replace(asked, as_of=None), target)) != set(expected)
