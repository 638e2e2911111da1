"""Two bearers of one bank, over random sequences of calls: neither learns anything of the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.errors import NotFoundError, OutOfRangeError, PermissionDeniedError
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient, record_digest

TEXTS = ("the same in both", "another text", "a third one")
IDS = ("a", "b")


def digest_of(text: str) -> str:
    encoder = HashEncoder()
    return record_digest(encode_gradient(encoder.encode([("", text)])[0].values, encoder.spec, DEFAULT_CODEC))


DIGESTS = {text: digest_of(text) for text in TEXTS}


@dataclass
class Bearer:
    """A caller, and what it must see: a function of its own calls alone."""

    client: Client
    namespace: str
    keeps_history: bool
    documents: dict[str, str] = field(default_factory=dict)  # id → text
    known: set[str] = field(default_factory=set)  # ids that it ever had
    sequence: int = 0  # of its last change
    past: dict[int, dict[str, str]] = field(default_factory=lambda: {0: {}})  # its documents after each change
    horizon: int = 0  # of its last change of what was there before, where that is not kept

    async def put(self, id: str, text: str) -> None:
        (answer,) = await self.client.ingest({"namespace": self.namespace, "id": id, "text": text})
        assert answer.gradient_digest == DIGESTS[text]
        self.known.add(id)
        if self.documents.get(id) != text:
            self._changed(answer.sequence, self.documents | {id: text}, is_new=id not in self.documents)

    async def delete(self, id: str, _text: str) -> None:
        if id in self.documents:
            sequence = (await self.client.delete(id, self.namespace)).sequence
            left = {other: text for other, text in self.documents.items() if other != id}
            self._changed(sequence, left, is_new=False)
        elif self.sequence:
            await self.client.refused(self.client.delete(id, self.namespace), NotFoundError)

    async def purge(self, id: str, _text: str) -> None:
        call = self.client.delete(id, self.namespace, purge=True)
        if id not in self.known:  # of the others it can be repeated, also where nothing is left of them
            if self.sequence:
                await self.client.refused(call, NotFoundError)
            else:
                call.close()
            return
        sequence = (await call).sequence
        if id in self.documents:
            self.past[sequence] = self.documents
        self.past = {when: {other: documents[other] for other in documents if other != id}
                     for when, documents in self.past.items()}  # fmt: skip
        self.documents, self.sequence = self.past[max(self.past)], max(self.past)

    @property
    def had(self) -> set[str]:
        """Texts whose gradients it may fetch."""
        known = self.past.values() if self.keeps_history else (self.documents,)
        return {text for documents in known for text in documents.values()}

    def _changed(self, sequence: int, documents: dict[str, str], *, is_new: bool) -> None:
        if not (is_new or self.keeps_history):
            self.horizon = sequence
        self.documents, self.sequence, self.past[sequence] = documents, sequence, documents

    async def as_of(self, _id: str, text: str) -> None:
        """Each of its own states, between its changes, too; where it is refused, for a change of its own."""
        for sequence, documents in self.past.items() if self.sequence else ():
            for then in {sequence, min((late for late in self.past if late > sequence), default=sequence + 1) - 1}:
                query = {"namespace": self.namespace, "text": text, "top_k": 64, "include_text": True, "as_of": then}
                if then < self.horizon:
                    error = await self.client.refused(self.client.query(**query), OutOfRangeError)
                    assert error.limit == self.horizon
                else:
                    answer = await self.client.query(**query, include_gradients=True)
                    assert {hit.id: hit.text for hit in answer.hits} == documents
                    assert all(record_digest(hit.gradient) == DIGESTS[hit.text] for hit in answer.hits)

    async def query(self, id: str, text: str) -> None:
        if not self.sequence:
            await self.client.refused(self.client.query(namespace=self.namespace, text=text, top_k=1), NotFoundError)
            return
        answer = await self.client.query(
            namespace=self.namespace, text=text, top_k=64, include_text=True, include_gradients=True
        )
        assert {hit.id: hit.text for hit in answer.hits} == self.documents
        assert all(record_digest(hit.gradient) == hit.gradient_digest == DIGESTS[hit.text] for hit in answer.hits)
        if id in self.documents:
            assert (await self.client.get(id, self.namespace)).document.text == self.documents[id]
        else:
            await self.client.refused(self.client.get(id, self.namespace), NotFoundError)

    async def fetch(self, _id: str, text: str) -> None:
        fetching = self.client.fetch([DIGESTS[text]])
        if text in self.had:
            ((digest, record),) = await fetching
            assert record_digest(record) == digest == DIGESTS[text]
        else:
            error = await self.client.refused(fetching, NotFoundError)
            assert (error.kind, error.name) == ("gradient", DIGESTS[text])

    async def list(self, _id: str, _text: str) -> None:
        if self.sequence:
            answer = await self.client.list(namespace=self.namespace)
            assert {entry.id: entry.gradient_digest for entry in answer.documents} == {
                id: DIGESTS[text] for id, text in self.documents.items()
            }

    async def stats(self, _id: str, _text: str) -> None:
        stats = await self.client.stats()
        assert {entry.namespace: entry.num_documents for entry in stats.namespaces} == (
            {self.namespace: len(self.documents)} if self.sequence else {}
        )
        assert (stats.num_documents, stats.num_gradients) == (len(self.documents), len(self.had))
        assert stats.oldest_as_of == self.horizon
        assert (stats.sequence, stats.cache_hits, stats.cache_misses) == (self.sequence, 0, 0)
        assert stats.free_disk_bytes == 0, "the disk is everybody's"

    async def pry(self, id: str, text: str, namespace: str) -> None:
        """Every way into the other's namespace is shut, with one answer whatever there is."""
        client = self.client
        for call in (
            client.get(id, namespace),
            client.list(namespace=namespace),
            client.query(namespace=namespace, text=text, top_k=1),
            client.query(namespace=namespace, document_ids=[id], include_gradients=True),
            client.query(namespace=namespace, text=text, top_k=1, as_of=self.sequence),
            client.delete(id, namespace, purge=True),
            client.delete(id, namespace),
            client.ingest({"namespace": namespace, "id": id, "text": text}),
        ):
            error = await client.refused(call, PermissionDeniedError)
            assert error.fields().keys() == {"scope", "namespace"} and "exist" not in error.message
            assert id not in error.message.split("'") and text not in error.message


class Harness:
    """A bank in an event loop of its own, with two new bearers for each sequence."""

    def __init__(self, folder: Path, embedder: Embedder, runner: asyncio.Runner, history_seconds: int) -> None:
        self.runner = runner
        self.tokens = Tokens(folder)
        self.keeps_history = history_seconds > 0
        config = BankConfig(data_dir=folder / "bank", tokens_file=self.tokens.path, history_seconds=history_seconds)
        self.server = BankServer(config, HashEncoder(), embedder)
        self._numbers = itertools.count()

    async def play(self, steps: list[tuple[int, str, str, str]]) -> None:
        names = [f"{side}-{next(self._numbers)}" for side in ("left", "right")]
        credentials = [self.tokens.add(name, "read write", name) for name in names]
        target = self.server.address.target
        async with Client(target, credentials[0]) as left, Client(target, credentials[1]) as right:
            bearers = [
                Bearer(client, name, self.keeps_history) for client, name in zip((left, right), names, strict=True)
            ]
            for place, verb, id, text in steps:
                if verb == "pry":
                    await bearers[place].pry(id, text, names[1 - place])
                else:
                    await getattr(bearers[place], verb)(id, text)
            for bearer in bearers:
                for verb in ("query", "list", "stats", "as_of"):
                    await getattr(bearer, verb)(IDS[0], TEXTS[0])
                for text in TEXTS:
                    await bearer.fetch("", text)


@pytest.fixture(scope="module", params=[0, 3600], ids=["no history", "history"])
def harness(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, embedder: Embedder
) -> Iterator[Harness]:
    with asyncio.Runner() as runner:
        made = Harness(tmp_path_factory.mktemp("isolation"), embedder, runner, request.param)
        runner.run(made.server.start())
        yield made
        runner.run(made.server.stop())


STEP = st.tuples(
    st.sampled_from((0, 1)),
    st.sampled_from(("put", "put", "delete", "query", "fetch", "list", "stats", "pry", "as_of", "purge")),
    st.sampled_from(IDS),
    st.sampled_from(TEXTS),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(STEP, min_size=4, max_size=14))
def test_nothing_of_another_namespace_is_seen_inferred_or_fetched(
    harness: Harness, steps: list[tuple[int, str, str, str]]
) -> None:
    harness.runner.run(harness.play(steps))


def test_a_shared_record_stays_until_its_last_owner_deletes_it(harness: Harness) -> None:
    """The sequence that matters most, always played: equal texts, one blob, deletions on both sides."""
    same = TEXTS[0]
    steps = [(0, "put", "a", same), (1, "fetch", "a", same), (1, "put", "b", same), (1, "fetch", "b", same)]
    steps += [(0, "delete", "a", same), (0, "fetch", "a", same), (1, "fetch", "b", same), (1, "query", "b", same)]
    steps += [(1, "put", "b", TEXTS[1]), (1, "fetch", "b", same), (0, "pry", "b", same)]
    harness.runner.run(harness.play(steps))
