"""Several queries in one call."""

from __future__ import annotations

import pytest

from bank_service.testing.client import Client
from bank_service.wire.errors import InvalidArgumentError, LearnerMismatchError, LimitExceededError, NotFoundError
from bank_service.wire.generated import bank_pb2 as pb
from tests.bank.search.test_query import put_facts


@pytest.mark.asyncio
async def test_a_batch_has_the_answers_of_its_queries_alone_in_their_order(client: Client) -> None:
    await put_facts(client)
    await put_facts(client, "second")
    queries = [
        {"text": "mice", "top_k": 2, "include_text": True},
        {"text": "comet", "top_k": 1, "include_gradients": True, "namespace": "second"},
        {"document_ids": ["sugar", "owl"]},
        {"text": "stone", "top_k": 3, "retrieval": pb.HYBRID},
        {"text": "mice", "top_k": 2, "include_text": True},
    ] * 12
    responses = await client.query_batch(*queries)
    assert len(responses) == 60
    for fields, response in zip(queries, responses, strict=True):
        assert response == await client.query(**fields) and response.hits
    assert len(await client.query_batch(*[{"text": "x", "top_k": 1}] * 64)) == 64


@pytest.mark.asyncio
async def test_an_error_names_the_query(client: Client) -> None:
    await put_facts(client)
    good = {"text": "mice", "top_k": 2}
    for bad, kind, field in (
        ({"text": "mice", "top_k": 0}, InvalidArgumentError, "queries[1].top_k"),
        ({"vector": [1.0], "top_k": 1}, InvalidArgumentError, "queries[1].vector"),
        ({"text": "x", "top_k": 1, "namespace": "none"}, NotFoundError, None),
        ({"document_ids": ["nobody"]}, NotFoundError, None),
        ({"text": "x", "top_k": 1, "learner_fingerprint": "f" * 64}, LearnerMismatchError, None),
    ):
        error = await client.refused(client.query_batch(good, bad, good), kind)
        assert error.index == 1 and error.message.startswith("queries[1]: ")
        assert field is None or error.field == field
    for count in (0, 65):
        error = await client.refused(client.query_batch(*[good] * count), InvalidArgumentError)
        assert error.field == "queries" and f"got {count}" in error.message


@pytest.mark.asyncio
async def test_a_batch_sees_what_was_acknowledged_before_it(client: Client) -> None:
    for number in range(10):
        await client.put("a", f"mice {number}")
        first, second = await client.query_batch({"text": "mice", "top_k": 9}, {"document_ids": ["a"]})
        assert [hit.version for hit in (*first.hits, *second.hits)] == [number + 1] * 2
    await client.delete("a")
    (answer,) = await client.query_batch({"text": "mice", "top_k": 9})
    assert not answer.hits


@pytest.mark.asyncio
async def test_answers_too_large_together_are_refused_with_the_limit(client: Client) -> None:
    await client.ingest(*({"id": f"big {n}", "text": f"{n} " + "x" * 1_000_000} for n in range(10)))
    query = {"text": "x", "top_k": 10, "include_text": True}
    assert len(await client.query_batch(query, query, query)) == 3
    error = await client.refused(client.query_batch(query, query, query, query), LimitExceededError)
    assert error.limit == "max_message_bytes" and "together" in error.message
