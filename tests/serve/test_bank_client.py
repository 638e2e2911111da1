"""The bank's client against a real bank."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from bank_service.wire.codec import WrongLearnerError, record_digest
from bank_service.wire.errors import (
    BankError,
    DeadlineExceededError,
    LearnerMismatchError,
    NotFoundError,
    UnavailableError,
)
from regrad_vllm.adapt.bank_client import BankClient, Hit, Query
from regrad_vllm.learner import Learner
from tests.serve.support import BankThread, free_port, random_learner

T = TypeVar("T")


def using(bank: str, learner: Learner, ask: Callable[[BankClient], Awaitable[T]], timeout_ms: int = 20_000) -> T:
    async def run() -> T:
        client = BankClient(bank, learner.spec, timeout_ms)
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(run())


async def fetch_all(client: BankClient, digests: list[str]) -> dict[str, bytes]:
    return {digest: record async for digest, record in client.fetch(digests)}


def test_documents_named_by_id_come_in_the_order_named(bank: BankThread, learner: Learner) -> None:
    query = Query("default", document_ids=("doc-9", "doc-2"), with_text=True)
    hits = using(bank.address, learner, lambda client: client.query(query))
    assert [hit.id for hit in hits] == ["doc-9", "doc-2"]
    assert [hit.score for hit in hits] == [1, 1] and hits[0].text.startswith("Fact number 9")


def test_a_text_finds_the_documents_that_are_near_it(bank: BankThread, learner: Learner) -> None:
    query = Query("default", text="Fact number 33: the answer to riddle 33 is 221.", top_k=3)
    hits = using(bank.address, learner, lambda client: client.query(query))
    assert len(hits) == 3 and hits[0].id == "doc-33" and hits[0].text == ""
    assert hits[0].score >= hits[1].score >= hits[2].score


def test_records_arrive_whole_and_as_asked(bank: BankThread, learner: Learner) -> None:
    async def ask(client: BankClient) -> tuple[tuple[Hit, ...], dict[str, bytes]]:
        hits = await client.query(Query("default", document_ids=("doc-1", "doc-2", "doc-3")))
        return hits, await fetch_all(client, [hit.gradient_digest for hit in hits])

    hits, records = using(bank.address, learner, ask)
    assert list(records) == [hit.gradient_digest for hit in hits]
    for hit in hits:
        assert record_digest(records[hit.gradient_digest]) == hit.gradient_digest
        assert len(records[hit.gradient_digest]) == hit.gradient_bytes > 2**20, "more than one message"


def test_the_banks_errors_come_back_as_they_are(bank: BankThread, learner: Learner) -> None:
    with pytest.raises(NotFoundError) as caught:
        using(bank.address, learner, lambda client: client.query(Query("nowhere", text="x")))
    assert (caught.value.kind, caught.value.name) == ("namespace", "nowhere")
    with pytest.raises(NotFoundError) as caught:
        using(bank.address, learner, lambda client: fetch_all(client, ["0" * 64]))
    assert caught.value.kind == "gradient"


def test_a_bank_of_another_learner_is_noticed_by_the_query_and_by_the_fetch(
    bank: BankThread, learner: Learner, model: Path
) -> None:
    other = random_learner(model, seed=3)
    with pytest.raises(LearnerMismatchError) as caught:
        using(bank.address, other, lambda client: client.query(Query("default", text="x")))
    assert {caught.value.expected, caught.value.actual} == {learner.fingerprint, other.fingerprint}
    named = Query("default", document_ids=("doc-1",))
    (hit,) = using(bank.address, learner, lambda client: client.query(named))
    with pytest.raises(WrongLearnerError):
        using(bank.address, other, lambda client: fetch_all(client, [hit.gradient_digest]))


def test_no_bank_is_unavailable_within_the_deadline(learner: Learner) -> None:
    start = time.monotonic()
    with pytest.raises((UnavailableError, DeadlineExceededError)) as caught:
        using(f"127.0.0.1:{free_port()}", learner, lambda client: client.stats(), timeout_ms=800)
    assert isinstance(caught.value, BankError)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("query", [{"text": ""}, {"text": "x", "document_ids": ("a",)}])
def test_a_query_is_a_text_or_ids(query: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="either text or document_ids"):
        Query("default", **query)  # type: ignore[arg-type]
