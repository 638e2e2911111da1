"""Filters, as a caller sees them. ``test_nearest`` has filters of many documents."""

from __future__ import annotations

import pytest

from bank_service.testing.client import Client
from bank_service.wire.generated import bank_pb2 as pb


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
