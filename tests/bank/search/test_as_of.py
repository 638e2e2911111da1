"""as_of: at every sequence of a random life, what the bank answered then."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bank_service.bank import Bank
from bank_service.errors import InvalidArgumentError, NotFoundError, OutOfRangeError
from bank_service.service.offline import opened
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.documents import Document, Hit, Query, Retrieval
from bank_service.values.filters import Condition, Operator
from bank_service.wire.record import record_digest
from tests.bank import inside
from tests.bank.search.collection import go, usearch_of

SPACES = ("default", "team")
WORDS = ("owl", "barn", "mice", "comet", "stone", "sugar")
RED = (Condition("colour", Operator.EQUALS, ("red",)),)
NOT_RED = (Condition("colour", Operator.NOT_EQUALS, ("red",)), Condition("é", Operator.ABSENT))
HISTORY_SECONDS = 3600


def queries(namespace: str) -> list[Query]:
    """With as many hits as there are documents, so that what is purged can be taken out of a recorded answer."""
    return [
        Query(namespace, "owl barn", top_k=64, include_text=True, conditions=conditions)
        for conditions in ((), RED, NOT_RED)
    ]


@asynccontextmanager
async def open_bank(folder: Path, **settings: object) -> AsyncIterator[Bank]:
    folder.mkdir(exist_ok=True)
    config = BankConfig(data_dir=folder, **{"history_seconds": HISTORY_SECONDS, **settings})  # type: ignore[arg-type]
    async with opened(config, HashEncoder(), HashEmbedder()) as bank:
        inside.upkeep(bank).history_cleaner.start()  # as where it is served
        yield bank


@dataclass
class Life:
    """A bank's random life, and what it answered after each change."""

    draw: random.Random
    num_ids: int = 8
    sequence: int = 0
    answers: dict[tuple[int, Query], tuple[Hit, ...]] = field(default_factory=dict)
    alive: dict[tuple[str, str], Document] = field(default_factory=dict)
    ever: set[tuple[str, str]] = field(default_factory=set)
    purged: dict[tuple[str, str], int] = field(default_factory=dict)  # → the sequence at which it was

    async def step(self, bank: Bank) -> None:
        namespace, id = self.draw.choice(SPACES), f"d{self.draw.randrange(self.num_ids)}"
        now = self.alive.get((namespace, id))
        choice = self.draw.random()
        if now is not None and choice < 0.15:
            self.sequence = (await bank.delete(namespace, id)).sequence
            del self.alive[namespace, id]
        elif (namespace, id) in self.ever and choice < 0.25:
            await self._purge(bank, namespace, id)
        else:
            text = " ".join(self.draw.choices(WORDS, k=3)) if now is None or choice < 0.8 else now.text
            pairs = {name: self.draw.choice(("red", "blue")) for name in ("colour", "é") if self.draw.random() < 0.5}
            document = Document(namespace, id, "", text, pairs)
            # Where nothing changed it is the document's own, which may be older.
            self.sequence = max(self.sequence, (await bank.put(document)).stored.sequence)
            self.alive[namespace, id] = document
            self.ever.add((namespace, id))
        await self.record(bank)

    async def _purge(self, bank: Bank, namespace: str, id: str) -> None:
        was_alive = self.alive.pop((namespace, id), None) is not None
        try:
            result = await bank.delete(namespace, id, purge=True)
        except NotFoundError:
            assert not was_alive and (namespace, id) in self.purged, "else there was something to purge"
            return
        assert result.sequence == (self.sequence + 1 if was_alive else result.sequence)
        self.sequence = max(self.sequence, result.sequence)
        self.purged[namespace, id] = self.sequence

    async def record(self, bank: Bank) -> None:
        for namespace in SPACES:
            for query in queries(namespace):
                try:
                    self.answers[self.sequence, query] = (await bank.query(query)).hits
                except NotFoundError:  # the namespace, which has nothing yet
                    self.answers[self.sequence, query] = ()

    async def check(self, bank: Bank, oldest: int = 0) -> None:
        """Every answer recorded, from ``oldest`` on, is given again, but for what was purged after it."""
        for (sequence, query), hits in self.answers.items():
            if sequence < oldest:
                continue
            left = [hit for hit in hits if self.purged.get((query.namespace, hit.id), -1) < sequence]
            for top_k, least in ((64, -1.0), self.draw.choice(((2, -1.0), (64, 0.3)))):
                asked = _as_of(query, sequence, top_k, least)
                answer = await bank.query(asked)
                assert answer.sequence == sequence
                expected = [hit for hit in left[:top_k] if hit.cosine >= least]
                assert list(answer.hits) == expected, (sequence, query)
            await self._check_named(bank, sequence, query, left)

    async def _check_named(self, bank: Bank, sequence: int, query: Query, hits: list[Hit]) -> None:
        if query.conditions:
            return
        ids = tuple(hit.id for hit in hits)
        if ids:
            asked = Query(query.namespace, document_ids=ids, include_gradients=True, include_text=True, as_of=sequence)
            answer = await bank.query(asked)
            assert [(hit.id, hit.version, hit.gradient_digest, hit.text) for hit in answer.hits] == [
                (hit.id, hit.version, hit.gradient_digest, hit.text) for hit in hits
            ]
            assert all(record_digest(answer.records[hit.gradient_digest]) == hit.gradient_digest for hit in hits)
        missing = next(f"d{n}" for n in range(self.num_ids + 1) if f"d{n}" not in ids)
        with pytest.raises(NotFoundError) as caught:
            await bank.query(Query(query.namespace, document_ids=(*ids, missing), as_of=sequence))
        assert caught.value.name == missing


def _as_of(query: Query, sequence: int, top_k: int, min_score: float) -> Query:
    return Query(
        query.namespace, query.text, top_k=top_k, min_score=min_score, include_text=True,
        conditions=query.conditions, as_of=sequence,
    )  # fmt: skip


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["exact", "scan", "proposals", "all"])
async def test_at_every_sequence_a_query_is_answered_as_it_was_then(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    exact_below = 2000 if way == "exact" else 0
    life = Life(random.Random(way))
    for _ in range(3):
        async with open_bank(tmp_path / "bank", exact_below=exact_below) as bank:
            for _ in range(16):
                await life.step(bank)
            for namespace in SPACES:
                await usearch_of(bank).compactor.compact(namespace)
            await life.check(bank, life.sequence - 10)
    assert life.purged and sum(map(bool, life.answers.values())) > 80, "else this test shows little"
    async with open_bank(tmp_path / "bank", exact_below=exact_below) as bank:
        await life.check(bank)
        assert (await bank.stats()).totals.num_past_versions > 8
    # The same without the history: the bank says that it doesn't know, or is right.
    async with open_bank(tmp_path / "bank", exact_below=exact_below, history_seconds=0) as bank:
        await inside.upkeep(bank).history_cleaner.clean()
        stats = (await bank.stats()).totals
        assert stats.num_past_versions == 0 and stats.oldest_as_of <= life.sequence
        await life.check(bank, stats.oldest_as_of)
        with pytest.raises(OutOfRangeError):
            await bank.query(Query(SPACES[0], "x", top_k=1, as_of=0))


@pytest.mark.asyncio
async def test_the_past_stands_still_while_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go("proposals", monkeypatch)
    async with open_bank(tmp_path / "bank", exact_below=0) as bank:
        for number in range(60):
            await bank.put(Document("", f"d{number}", "", f"{WORDS[number % 6]} {number}"))
        query = Query("", "owl barn", top_k=10, include_gradients=True)
        expected = await bank.query(query)

        newest = expected.sequence

        async def write() -> None:
            nonlocal newest
            while True:
                id = f"d{random.randrange(60)}"
                result = await bank.put(Document("", id, "", f"owl {random.random()}"))
                newest = max(newest, result.stored.sequence)

        writers = [asyncio.create_task(write()) for _ in range(4)]
        asked = Query("", "owl barn", top_k=10, include_gradients=True, as_of=expected.sequence)
        num_checks = num_moved = 0
        while num_checks < 60 or num_moved < 30:  # the test's own limit ends it
            before = newest
            answer = await bank.query(asked)
            num_checks, num_moved = num_checks + 1, num_moved + (newest > before)
            assert not any(writer.done() for writer in writers), "they write all the time"
            assert [hit.id for hit in answer.hits] == [hit.id for hit in expected.hits]
            assert answer.records == expected.records and answer.sequence == expected.sequence
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        assert newest >= expected.sequence + num_moved
        assert (await bank.stats()).totals.num_past_versions >= num_moved, "of documents that were there"


@pytest.mark.asyncio
async def test_without_history_only_what_was_superseded_is_unknown(client: Client) -> None:
    for id in "abc":
        await client.put(id, f"text {id}")
    await client.put("a", "in another namespace", namespace="other")
    for sequence, ids in enumerate(["", "a", "ab", "abc", "abc"]):
        answer = await client.query(text="text", top_k=9, as_of=sequence)
        assert "".join(sorted(hit.id for hit in answer.hits)) == ids and answer.sequence == sequence
    changed = (await client.put("b", "another text")).sequence
    error = await client.refused(client.query(text="text", top_k=9, as_of=changed - 1), OutOfRangeError)
    assert (error.field, error.limit) == ("as_of", changed)
    assert f"as_of must be at least {changed}" in error.message and "--history-seconds" in error.message
    assert len((await client.query(text="text", top_k=9, as_of=changed)).hits) == 3
    assert len((await client.query(namespace="other", text="text", top_k=9, as_of=0)).hits) == 0, "knows all of its own"
    deleted = (await client.delete("c")).sequence
    await client.put("c", "back again")
    error = await client.refused(client.query(document_ids=["c"], as_of=changed), OutOfRangeError)
    assert error.limit == deleted
    await client.refused(client.query(document_ids=["c"], as_of=deleted), NotFoundError)
    stats = await client.stats()
    assert (stats.oldest_as_of, stats.num_past_versions) == (deleted, 0)


@pytest.mark.asyncio
async def test_what_cannot_be_answered_is_refused_with_its_field(client: Client) -> None:
    put = await client.put("a", "an owl")
    await client.put("a", "a comet")
    ask = {"text": "owl", "top_k": 1}
    for as_of in (put.sequence + 2, 2**64 - 1):
        error = await client.refused(client.query(**ask, as_of=as_of), InvalidArgumentError)
        assert error.field == "as_of" and f"must be at most {put.sequence + 1}" in error.message
    for retrieval in (Retrieval.LEXICAL, Retrieval.HYBRID):
        call = client.query(**ask, as_of=1, retrieval=retrieval.value)
        error = await client.refused(call, InvalidArgumentError)
        assert error.field == "retrieval" and "as_of" in error.message
    batch = client.query_batch(ask, {**ask, "as_of": 1})
    error = await client.refused(batch, OutOfRangeError)
    assert (error.field, error.index, error.limit) == ("queries[1].as_of", 1, 2)
    error = await client.refused(client.query_batch({**ask, "as_of": 9}), InvalidArgumentError)
    assert (error.field, error.index) == ("queries[0].as_of", 0)
    await client.refused(client.query(namespace="nowhere", **ask, as_of=0), NotFoundError)
    answers = await client.query_batch(ask, {**ask, "as_of": 2, "include_gradients": True})
    assert [answer.sequence for answer in answers] == [2, 2] and answers[1].hits[0].gradient


@pytest.mark.asyncio
async def test_an_answers_digests_can_be_fetched_as_long_as_as_of_finds_them(data_dir: Path) -> None:
    config = BankConfig(data_dir=data_dir, history_seconds=HISTORY_SECONDS)
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
        put = await client.put("a", "an owl")
        await client.put("a", "a comet")
        await client.delete("a")
        (hit,) = (await client.query(text="x", top_k=1, as_of=put.sequence)).hits
        assert (hit.id, hit.version, hit.gradient_digest) == ("a", 1, put.gradient_digest)
        ((digest, record),) = await client.fetch([hit.gradient_digest])
        assert record_digest(record) == digest
        stats = await client.stats()
        assert (stats.num_documents, stats.num_past_versions, stats.num_gradients) == (0, 2, 2)
        assert (stats.gradient_bytes, stats.oldest_as_of) == (2 * len(record), 0)
        await client.delete("a", purge=True)
        await client.refused(client.fetch([digest]), NotFoundError)
