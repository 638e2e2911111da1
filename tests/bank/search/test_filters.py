"""Filters: whatever holds of few or many, in small and large namespaces, nothing that matches is missed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bank_service.catalog.factory import open_catalog
from bank_service.search import retrieval
from bank_service.search.exact_vectors import ExactVectors
from bank_service.search.retrieval import Retriever
from bank_service.search.usearch_index import UsearchIndex
from bank_service.testing.client import Client
from bank_service.values.documents import Document, Gradient, Query
from bank_service.values.filters import Condition, Operator
from bank_service.wire.generated import bank_pb2 as pb
from tests.bank.catalog.test_catalog import IDENTITY

DIMENSION = IDENTITY.embedding_dimension
COLOURS = ("red", "green", "blue")
Expected = Callable[[dict[str, str]], bool]


def where(*conditions: tuple[str, str, list[str]]) -> pb.Filter:
    return pb.Filter(
        conditions=[
            pb.Filter.Condition(key=key, operator=pb.Filter.Condition.Operator.Value(name), values=values)
            for key, name, values in conditions
        ]
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([("colour", "EQUALS", ["red"])], "ad"),
        ([("colour", "EQUALS", ["red", "blue"])], "abd"),
        ([("colour", "NOT_EQUALS", ["red"])], "bc"),
        ([("colour", "PRESENT", [])], "abd"),
        ([("colour", "ABSENT", [])], "c"),
        ([("colour", "EQUALS", ["red"]), ("size", "EQUALS", ["1"])], "a"),
        ([("colour", "EQUALS", ["red"]), ("size", "ABSENT", [])], "d"),
        ([("colour", "EQUALS", ["red"]), ("size", "NOT_EQUALS", ["1", "2"])], "d"),
        ([("colour", "EQUALS", ["nothing"])], ""),
        ([("", "ABSENT", [])], "abcd"),
        ([("size", "EQUALS", ["1' OR 1=1"])], ""),
    ],
)  # fmt: skip
async def test_each_condition_means_what_the_contract_says(
    client: Client, conditions: list[tuple[str, str, list[str]]], expected: str
) -> None:
    for id, pairs in (
        ("a", {"colour": "red", "size": "1"}),
        ("b", {"colour": "blue", "size": "2"}),
        ("c", {}),
        ("d", {"colour": "red"}),
    ):
        await client.put(id, f"the thing {id}", metadata=pairs)
        await client.put(f"other {id}", "the thing", metadata=pairs, namespace="another")
    for kind in (pb.DENSE, pb.LEXICAL, pb.HYBRID):
        found = await client.query(text="thing", top_k=9, filter=where(*conditions), retrieval=kind)
        assert "".join(sorted(hit.id for hit in found.hits)) == expected


@pytest.mark.asyncio
async def test_a_filter_sees_a_change_of_metadata_and_a_deletion_at_once(client: Client) -> None:
    red = where(("colour", "EQUALS", ["red"]))
    await client.put("a", "text", metadata={"colour": "red"})
    assert [hit.id for hit in (await client.query(text="x", top_k=1, filter=red)).hits] == ["a"]
    await client.put("a", "text", metadata={"colour": "blue"})
    assert not (await client.query(text="x", top_k=1, filter=red)).hits
    await client.put("a", "text", metadata={"colour": "red"})
    await client.delete("a")
    assert not (await client.query(text="x", top_k=1, filter=red)).hits


@pytest.fixture(params=["exact", "scan", "proposals", "all"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the retriever finds what matches: its bounds are set so that it goes this way."""
    way = str(request.param)
    monkeypatch.setattr(retrieval, "SCAN_SIZE", {"proposals": 3, "all": 3}.get(way, 10_000))
    monkeypatch.setattr(retrieval, "MAX_PROPOSALS", 0 if way == "all" else 10_000)
    return way


def test_a_filtered_search_finds_the_nearest_that_match_whichever_way_it_goes(tmp_path: Path, way: str) -> None:
    catalog = open_catalog(tmp_path, IDENTITY)
    index = UsearchIndex(DIMENSION)
    generator, draw = np.random.default_rng(0), random.Random(0)
    vectors, pairs = {}, {}
    for number in range(600):
        id = f"doc {number}"
        vector = generator.standard_normal(DIMENSION).astype("<f4")
        vectors[id] = vector / np.linalg.norm(vector)
        pairs[id] = {"colour": draw.choice(COLOURS)} | ({"rare": "yes"} if number % 40 == 0 else {})
        gradient = Gradient("0" * 64, 1, 1, False, vectors[id].tobytes())
        stored = catalog.put(Document("n", id, "", "text", pairs[id]), gradient, None).result().stored
        index.put("n", [stored.key], vectors[id][None])
    retriever = Retriever(index, ExactVectors(DIMENSION), 10_000 if way == "exact" else 0)
    target = generator.standard_normal(DIMENSION).astype(np.float32)
    cases: list[tuple[Condition, Expected]] = [
        (Condition("colour", Operator.EQUALS, ("red",)), lambda found: found["colour"] == "red"),
        (Condition("colour", Operator.NOT_EQUALS, ("red", "blue")), lambda found: found["colour"] == "green"),
        (Condition("rare", Operator.PRESENT), lambda found: "rare" in found),
        (Condition("rare", Operator.ABSENT), lambda found: "rare" not in found),
        (Condition("colour", Operator.EQUALS, ("black",)), lambda found: False),
    ]
    for condition, expected in cases:
        for top_k in (1, 10, 64):
            with catalog.view() as view:
                query = Query("n", vector=(1.0,), top_k=top_k, conditions=(condition,))
                found = retriever.find(view, query, target, 600)
                hits = view.hits(found.scores, include_text=False)
            right = sorted((id for id in vectors if expected(pairs[id])), key=lambda id: -float(vectors[id] @ target))
            assert [hit.id for hit in hits] == right[:top_k] and not found.is_stale
    catalog.close()
