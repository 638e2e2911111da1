"""A collection from one learner to another, in a real bank, while documents come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bank_service.errors import CollectionMismatchError, InvalidArgumentError, LearnerMismatchError, UnavailableError
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.testing.hash_encoder import NO_TOKENS, HashEmbedder, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient
from benchmarks.crash.killable import Nursery, end

OLD, NEW = spec_of(), spec_of("next")
ENCODERS = {OLD: HashEncoder(), NEW: HashEncoder("next")}
NUM_DOCUMENTS = 40
Request = pb.UpgradeLearnerRequest


@pytest.fixture
def learner(tmp_path: Path) -> Path:
    """The folder of the next learner. The made-up encoder goes by its name."""
    folder = tmp_path / "next"
    folder.mkdir()
    return folder


def bank(data_dir: Path, encoder: HashEncoder | None = None, **settings: Any) -> BankServer:
    return BankServer(BankConfig(data_dir=data_dir, **settings), encoder or HashEncoder(), HashEmbedder())


async def asked(client: Client, action: Request.Action, learner: Path | str = "") -> Any:
    """The last message."""
    async with own_errors():
        request = Request(action=action, learner=str(learner))
        return [progress async for progress in client.stub.UpgradeLearner(request)][-1]


async def check(client: Client, spec: Any, *texts: str, **query: Any) -> list[Any]:
    """Asks by a learner for the nearest document to each text. Every gradient must be that learner's, of that text."""
    hits = []
    for text in texts:
        answer = await client.query(
            text=text, top_k=1, learner_fingerprint=spec.fingerprint, include_text=True, include_gradients=True, **query
        )
        (hit,) = answer.hits
        assert answer.learner_fingerprint == spec.fingerprint and hit.text == text
        exact = ENCODERS[spec].encode([("", text)])[0].values
        given = decode_gradient(hit.gradient, spec)  # it refuses a gradient of another learner
        assert np.linalg.norm(given - exact) < 0.7 * np.linalg.norm(exact)
        assert dict(await client.fetch([hit.gradient_digest])) == {hit.gradient_digest: hit.gradient}
        hits.append(hit)
    return hits


def blobs(data_dir: Path) -> int:
    return sum(path.is_file() for path in data_dir.glob("blobs/??/*"))


async def left(data_dir: Path, number: int) -> None:
    """Returns when so many gradients are stored. The sweep runs behind the answer."""
    for _ in range(200):
        if blobs(data_dir) == number:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{number} gradients must be left, there are {blobs(data_dir)}")


@pytest.mark.asyncio
async def test_both_learners_are_answered_while_documents_change_and_the_new_one_stays(
    data_dir: Path, learner: Path
) -> None:
    async with bank(data_dir, history_seconds=1000) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        before = (await client.put("d0", "an older text 0")).sequence
        await client.put("d0", "text 0")
        await client.refused(check(client, NEW, "text 0"), LearnerMismatchError)
        running = asyncio.create_task(asked(client, Request.BEGIN, learner))
        while not (await asked(client, Request.STATUS)).next_fingerprint:
            await asyncio.sleep(0)
        for n in range(12):
            await client.put(f"d{n}", f"another text {n}")
            await client.put(f"new {n}", f"a new text {n}")
            await client.put(f"d{12 + n}", f"text {12 + n}", metadata={"n": str(n)})
            await client.delete(f"d{NUM_DOCUMENTS - 1 - n}", purge=n % 2 == 0)
            for spec in (OLD, NEW):  # each sees what was acknowledged before
                await check(client, spec, f"another text {n}", f"a new text {n}", f"text {12 + n}")
        last = await running
        assert last.is_level and not last.problem
        assert (last.learner_fingerprint, last.next_fingerprint) == (OLD.fingerprint, NEW.fingerprint)
        assert (await client.stats()).learner_fingerprint == OLD.fingerprint
        kept = await client.get("d3")
        done = await asked(client, Request.FINISH)
        assert (done.learner_fingerprint, done.next_fingerprint) == (NEW.fingerprint, "")
        await client.refused(check(client, OLD, "another text 3"), LearnerMismatchError)
        after = await client.get("d3")
        assert (after.version, after.sequence) == (kept.version, kept.sequence)
        assert after.gradient_digest != kept.gradient_digest
        await check(client, NEW, "an older text 0", as_of=before)
        stats = await client.stats()
        assert stats.learner_fingerprint == NEW.fingerprint
        await left(data_dir, stats.num_gradients)
        await client.put("late", "a late text")
        await check(client, NEW, "a late text", "text 15", "another text 3")
    with pytest.raises(CollectionMismatchError, match="name the folder of that learner with --learner"):
        await bank(data_dir).start()
    async with bank(data_dir, HashEncoder("next")) as server, Client(server.address.target) as client:
        await check(client, NEW, "a late text", "another text 5")
        assert not (await asked(client, Request.STATUS)).next_fingerprint


@pytest.mark.asyncio
async def test_an_upgrade_that_is_taken_back_leaves_what_was_there(data_dir: Path, learner: Path) -> None:
    async with bank(data_dir) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        kept = [(await client.get(f"d{n}")).gradient_digest for n in range(NUM_DOCUMENTS)]
        assert (await asked(client, Request.BEGIN, learner)).is_level
        assert blobs(data_dir) == 2 * NUM_DOCUMENTS
        (hit,) = await check(client, NEW, "text 7")
        assert not (await asked(client, Request.BACK)).next_fingerprint
        await left(data_dir, NUM_DOCUMENTS)
        assert [(await client.get(f"d{n}")).gradient_digest for n in range(NUM_DOCUMENTS)] == kept
        await client.refused(check(client, NEW, "text 7"), LearnerMismatchError)
        await check(client, OLD, "text 7")
        assert (await asked(client, Request.BEGIN, learner)).is_level, "it can begin again"
        assert (await check(client, NEW, "text 7"))[0].gradient_digest == hit.gradient_digest


def test_a_bank_that_is_killed_in_the_middle_goes_on(data_dir: Path, learner: Path, tmp_path: Path) -> None:
    async def begin(target: str) -> None:
        async with Client(target) as client:
            await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(200)))
            async for progress in client.stub.UpgradeLearner(Request(action=Request.BEGIN, learner=str(learner))):
                assert not progress.is_level
                break
            while not (await asked(client, Request.STATUS)).num_done:
                await asyncio.sleep(0)

    async def go_on(target: str) -> None:
        async with Client(target) as client:
            last = await asked(client, Request.BEGIN, learner)
            assert last.is_level and last.num_versions == last.num_done == 200
            for spec in (OLD, NEW):
                await check(client, spec, "text 0", "text 100", "text 199")
            assert (await asked(client, Request.FINISH)).learner_fingerprint == NEW.fingerprint
            await check(client, NEW, "text 0", "text 199")

    with Nursery(tmp_path / "log") as nursery:
        killed = nursery.start(data_dir)
        asyncio.run(begin(killed.address.target))
        end(killed.handle)
        num_blobs = blobs(data_dir)
        assert 200 < num_blobs < 400, "it was killed in the middle"
        asyncio.run(go_on(nursery.start(data_dir).address.target))


class Waiting(HashEncoder):
    """Encodes a document with the word "slow" when it is told to."""

    def __init__(self, learner: str = "a learner") -> None:
        super().__init__(learner)
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        if any("slow" in text for _, text in documents):
            self.begun.set()
            self.go.wait(20)
        return super().encode(documents)


@pytest.mark.asyncio
async def test_documents_and_uploads_on_their_way_at_the_end_get_the_new_learner_or_are_refused(
    data_dir: Path, learner: Path
) -> None:
    encoder = Waiting()
    async with bank(data_dir, encoder) as server, Client(server.address.target) as client:
        await client.put("a", "a text")
        record = encode_gradient(HashEncoder().encode([("", "b")])[0].values, OLD, DEFAULT_CODEC)
        await client.upload(*upload_of(pb.Document(id="b", text="an uploaded text"), record))
        assert (await asked(client, Request.BEGIN, learner)).is_level
        putting = asyncio.create_task(client.put("slow", "a slow text"))
        await asyncio.to_thread(encoder.begun.wait, 20)
        assert (await asked(client, Request.FINISH)).learner_fingerprint == NEW.fingerprint
        encoder.go.set()
        assert (await putting).version == 1
        await check(client, NEW, "a slow text", "a text", "an uploaded text")
        upload = client.upload(*upload_of(pb.Document(id="c", text="c"), record))
        await client.refused(upload, LearnerMismatchError)


@pytest.mark.asyncio
async def test_a_damaged_gradient_of_the_next_learner_is_made_again(data_dir: Path, learner: Path) -> None:
    async with bank(data_dir, redis_url=None) as server, Client(server.address.target) as client:
        await client.put("a", "a text")
        assert (await asked(client, Request.BEGIN, learner)).is_level
        query = {"document_ids": ["a"], "learner_fingerprint": NEW.fingerprint}
        (hit,) = (await client.query(**query)).hits
        path = data_dir / "blobs" / hit.gradient_digest[:2] / hit.gradient_digest[2:]
        path.write_bytes(path.read_bytes()[:-1])
        ((_, record),) = await client.fetch([hit.gradient_digest])
        decode_gradient(record, NEW)
        assert server.metrics.registry.get_sample_value("regrad_bank_repaired_gradients_total") == 1


@pytest.mark.asyncio
async def test_a_bank_started_with_the_next_learner_finishes_a_level_upgrade_and_no_other(
    data_dir: Path, learner: Path
) -> None:
    async with bank(data_dir) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(3)), {"id": "e", "text": "e"})
        assert (await asked(client, Request.BEGIN, learner)).is_level
        await asked(client, Request.BACK)
        record = encode_gradient(HashEncoder().encode([("", "x")])[0].values, OLD, DEFAULT_CODEC)
        await client.upload(*upload_of(pb.Document(id="x", text=f"x {NO_TOKENS}"), record))
        stuck = await asked(client, Request.BEGIN, learner)
        assert "can't be encoded" in stuck.problem and not stuck.is_level
        error = await client.refused(asked(client, Request.FINISH), UnavailableError)
        assert "1 of 5 lack it" in error.message and "can't be encoded" in error.message
        await client.refused(client.query(document_ids=["x"], learner_fingerprint=NEW.fingerprint), UnavailableError)
    with pytest.raises(CollectionMismatchError):
        await bank(data_dir, HashEncoder("next")).start()
    async with bank(data_dir) as server, Client(server.address.target) as client:
        await client.delete("x")
        assert (await asked(client, Request.BEGIN, learner)).is_level
    async with bank(data_dir, HashEncoder("next")) as server, Client(server.address.target) as client:
        await check(client, NEW, "text 0", "text 2")
        await left(data_dir, 4)


@pytest.mark.asyncio
async def test_an_upgrade_whose_learner_is_gone_waits_and_can_be_taken_back(data_dir: Path, learner: Path) -> None:
    async with bank(data_dir) as server, Client(server.address.target) as client:
        await client.put("a", "a text")
        assert (await asked(client, Request.BEGIN, learner)).is_level
    learner.rmdir()
    async with bank(data_dir) as server, Client(server.address.target) as client:
        await client.put("b", "text of b")
        await check(client, NEW, "a text")
        await client.refused(check(client, NEW, "text of b"), UnavailableError)
        await check(client, OLD, "text of b")
        assert str(learner) in (await asked(client, Request.STATUS)).problem
        await client.refused(asked(client, Request.FINISH), UnavailableError)
        assert not (await asked(client, Request.BACK)).next_fingerprint
        await left(data_dir, 2)


@pytest.mark.asyncio
async def test_what_can_not_be_done_is_refused(data_dir: Path, learner: Path, tmp_path: Path) -> None:
    (tmp_path / "a learner").mkdir()
    async with bank(data_dir) as server, Client(server.address.target) as client:
        await client.put("a", "a text")
        for folder, reason in (
            ("next", "absolute"), (tmp_path / "absent", "does not exist"), (tmp_path / "a learner", "the same"),
        ):  # fmt: skip
            error = await client.refused(asked(client, Request.BEGIN, folder), InvalidArgumentError)
            assert error.field == "learner" and reason in error.message
        await client.refused(asked(client, Request.ACTION_UNSPECIFIED), InvalidArgumentError)
        for action in (Request.FINISH, Request.BACK):
            await client.refused(asked(client, action), UnavailableError)
        assert (await asked(client, Request.BEGIN, learner)).is_level
        other = asked(client, Request.BEGIN, tmp_path / "a learner")
        assert str(learner) in (await client.refused(other, UnavailableError)).message
        await client.refused(recoded(client), UnavailableError)


async def recoded(client: Client) -> None:
    async with own_errors():
        async for _ in client.stub.RecodeCollection(pb.RecodeCollectionRequest(codec=DEFAULT_CODEC)):
            pass
