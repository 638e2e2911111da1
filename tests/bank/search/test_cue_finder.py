"""Cues: the hits' sentences that are nearest to a question."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from bank_service.backup.restore import restore
from bank_service.bank import Bank
from bank_service.search import cue_finder
from bank_service.service.offline import opened
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.values.documents import Document, Query, Retrieval
from bank_service.values.embedder import Embedder, embedded_text
from bank_service.wire.errors import InvalidArgumentError, OverloadedError
from bank_service.wire.record import FloatArray, encode_gradient
from tests.bank import inside
from tests.bank.upkeep.test_erasure import within_the_bound

MILL = "The mill was built in 1652 by two brothers. It grinds rye.\n\nIts wheel was made of larch wood."
SHOP = "The shop opens at nine in the morning. On Sundays it is closed."
WHEEL, OPENS = "Its wheel was made of larch wood.", "The shop opens at nine in the morning."
CLOSED = "On Sundays it is closed."
QUESTION = "What wood is the wheel of?"
OF_BOTH = "Of what wood is the wheel, and when does the shop open?"


class CountingEmbedder:
    """The bank's embedder, and the texts that it embedded."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.name, self.dimension = embedder.name, embedder.dimension
        self.texts: list[str] = []
        self.waiting: set[str] = set()  # titles of documents whose sentences are held
        self._may_embed = threading.Event()
        self._may_embed.set()

    def embed(self, text: str) -> FloatArray:
        self.texts.append(text)
        title, _, sentence = text.partition("\n")
        if sentence and not self._may_embed.is_set():
            self.waiting.add(title)
            self._may_embed.wait(30)
        return self._embedder.embed(text)

    @contextmanager
    def sentences_held(self) -> Iterator[None]:
        """Within the block, texts with a title wait."""
        self._may_embed.clear()
        try:
            yield
        finally:
            self._may_embed.set()

    def reads_all(self, text: str) -> bool:
        return self._embedder.reads_all(text)

    def taken(self) -> list[str]:
        """The texts since the last call."""
        taken, self.texts = self.texts, []
        return taken


@pytest.fixture
def counting(embedder: Embedder) -> CountingEmbedder:
    return CountingEmbedder(embedder)


def mill(text: str = MILL, **pairs: str) -> Document:
    return Document("", "mill", "The mill", text, pairs)


SHOP_DOCUMENT = Document("", "shop", "The shop", SHOP)


async def cue(bank: Bank, text: str = QUESTION, **fields: object) -> dict[str, list[str]]:
    """id → the sentences of the hits that have any."""
    query = Query("", **{"text": text, "top_k": 5, "with_cue": 2, **fields})  # type: ignore[arg-type]
    return {hit.id: [sentence.text for sentence in hit.cue] for hit in (await bank.query(query)).hits if hit.cue}


def num_rows(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM sentence_vectors").fetchone()[0])


def stored_vectors(folder: Path) -> set[bytes]:
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as connection:
        return {row[0] for row in connection.execute("SELECT vectors FROM sentence_vectors")}


def files_with(folder: Path, traces: Iterable[bytes]) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(trace in path.read_bytes() for trace in traces)]


@pytest.mark.asyncio
async def test_a_hit_has_its_nearest_sentences_with_places_and_cosines(
    data_dir: Path, counting: CountingEmbedder
) -> None:
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir), HashEncoder(), counting) as bank:
        await bank.put(mill())
        await bank.put(SHOP_DOCUMENT)
        assert len(counting.taken()) == 2 + 3 + 2, "each document and each sentence, once"
        hits = (await bank.query(Query("", OF_BOTH, top_k=2, with_cue=3))).hits
        assert counting.taken() == [OF_BOTH]
        assert [(hit.id, hit.title, hit.text) for hit in hits] == [("mill", "The mill", ""), ("shop", "The shop", "")]
        assert [[sentence.text for sentence in hit.cue] for hit in hits] == [[WHEEL], [OPENS, CLOSED]]
        for hit, text in zip(hits, (MILL, SHOP), strict=True):
            for sentence in hit.cue:
                assert text[sentence.start : sentence.end] == sentence.text
                cosine = counting.embed(embedded_text(hit.title, sentence.text)) @ counting.embed(OF_BOTH)
                assert sentence.score == pytest.approx(float(cosine), abs=1e-3), "float16 keeps three digits"
        assert await cue(bank, with_cue=0) == {}
        assert await cue(bank, with_cue=1) == {"mill": [WHEEL]}
        assert await cue(bank, with_cue=2) == {"mill": [WHEEL, "It grinds rye."]}, "both are nearer than the shop's"
        assert await cue(bank, "When does it open?", top_k=1, with_cue=1) == {"shop": [OPENS]}
        assert await cue(bank, "quux", retrieval=Retrieval.LEXICAL) == {}


@pytest.mark.asyncio
async def test_a_cue_is_for_the_question_that_the_query_names(client: Client, embedder: Embedder) -> None:
    await client.ingest(*({"id": id, "text": text} for id, text in (("mill", MILL), ("shop", SHOP))))
    by_id = await client.query(document_ids=["shop", "mill"], with_cue=1, cue_text=QUESTION)
    assert [[sentence.text for sentence in hit.cue] for hit in by_id.hits] == [[], [WHEEL]]
    by_vector = await client.query(vector=embedder.embed("rye").tolist(), top_k=2, with_cue=1, cue_text=QUESTION)
    by_text = await client.query(text="rye", top_k=2, with_cue=1, cue_text=QUESTION)
    for answer in (by_vector, by_text):
        assert [sentence.text for hit in answer.hits for sentence in hit.cue] == [WHEEL]
    long = "\n".join([*(f"2026-11-29 worker {n} retries" for n in range(400)), QUESTION])
    assert [item.text for hit in (await client.query(text=long, top_k=2, with_cue=1)).hits for item in hit.cue] == [
        WHEEL
    ]
    batch = await client.query_batch(
        {"text": OF_BOTH, "top_k": 2, "with_cue": 2}, {"text": QUESTION, "top_k": 2, "include_text": True}
    )
    assert [[sentence.text for sentence in hit.cue] for hit in batch[0].hits] == [[WHEEL], [OPENS]]
    assert [list(hit.cue) for hit in batch[1].hits] == [[], []]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "x", "with_cue": 5}, "with_cue"),
        ({"text": "x", "cue_text": "x"}, "cue_text"),
        ({"text": "x", "with_cue": 1, "cue_text": " "}, "cue_text"),
        ({"document_ids": ["mill"], "with_cue": 1}, "cue_text"),
        ({"vector": [1.0] * 384, "with_cue": 1}, "cue_text"),
    ],
)
async def test_a_cue_that_cannot_be_chosen_is_refused(client: Client, fields: dict[str, object], field: str) -> None:
    error = await client.refused(client.query(top_k=1, **fields), InvalidArgumentError)
    assert error.field == field


@pytest.mark.asyncio
async def test_what_was_not_embedded_at_its_ingest_is_at_its_first_cue(
    data_dir: Path, counting: CountingEmbedder
) -> None:
    """With the setting off, of an older bank, and of an uploaded gradient."""
    data_dir.mkdir()
    record = encode_gradient(np.ones(spec_of().num_values, np.float32), spec_of(), "fp32")
    async with opened(BankConfig(data_dir=data_dir, embed_sentences=False), HashEncoder(), counting) as bank:
        await bank.put(mill())
        assert len(counting.taken()) == 1 and num_rows(data_dir) == 0
        await bank.put_gradient(SHOP_DOCUMENT, record, counting.embed(SHOP).tolist())
        counting.taken()
        for expected in (1 + 3 + 2, 1):
            assert await cue(bank, OF_BOTH) == {"mill": [WHEEL], "shop": [OPENS]}
            assert len(counting.taken()) == expected
            await within_the_bound(lambda: num_rows(data_dir) == 2)
    async with opened(BankConfig(data_dir=data_dir), HashEncoder(), counting) as bank:
        await bank.put_gradient(Document("", "own", "", "One. Two."), record, counting.embed("x").tolist())
        assert counting.taken() == ["x"], "a vector of the caller's own costs no embedding"
        await bank.put_gradient(Document("", "given", "", "One. Two."), record)
        assert counting.taken() == ["One. Two."]


@pytest.mark.asyncio
async def test_a_change_of_metadata_or_codec_embeds_nothing_again(data_dir: Path, counting: CountingEmbedder) -> None:
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir), HashEncoder(), counting) as bank:
        await bank.put(mill())
        counting.taken()
        await bank.put(mill(colour="red"))
        [progress async for progress in bank.recode("factors-2-1-4")]
        assert counting.taken() == [] and (await bank.get("", "mill")).version == 3
        assert await cue(bank) == {"mill": [WHEEL, "It grinds rye."]} and counting.taken() == [QUESTION]
        assert num_rows(data_dir) == 1
        await bank.put(mill("The mill burnt down. It was of oak wood."))
        assert await cue(bank, with_cue=1) == {"mill": ["It was of oak wood."]}


@pytest.mark.asyncio
async def test_the_past_has_its_own_cues(data_dir: Path, counting: CountingEmbedder) -> None:
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir, history_seconds=3600), HashEncoder(), counting) as bank:
        before = (await bank.put(mill())).stored.sequence
        after = (await bank.put(mill("The wheel is of oak wood now. It turns."))).stored.sequence
        await bank.delete("", "mill")
        assert await cue(bank) == {}
        counting.taken()
        assert await cue(bank, with_cue=1, as_of=before) == {"mill": [WHEEL]}
        assert await cue(bank, with_cue=1, as_of=after) == {"mill": ["The wheel is of oak wood now."]}
        named = Query("", document_ids=("mill",), with_cue=1, cue_text=QUESTION, as_of=before)
        assert [item.text for item in (await bank.query(named)).hits[0].cue] == [WHEEL]
        assert counting.taken() == [QUESTION] * 3


@pytest.mark.asyncio
async def test_a_purge_leaves_no_vector_of_a_sentence_in_any_file(data_dir: Path, embedder: Embedder) -> None:
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir, history_seconds=3600), HashEncoder(), embedder) as bank:
        await bank.put(mill())
        await bank.put(mill("Another text. Of two sentences."))
        traces = {vectors[:64] for vectors in stored_vectors(data_dir)}
        assert len(traces) == 2 and files_with(data_dir, traces)
        await bank.put(SHOP_DOCUMENT)
        await bank.delete("", "mill", purge=True)
        assert num_rows(data_dir) == 1
        await within_the_bound(lambda: not files_with(data_dir, traces))
        assert await cue(bank) == {"shop": [OPENS, CLOSED]}


@pytest.mark.asyncio
async def test_a_document_that_goes_between_search_and_cue_gives_none(data_dir: Path, embedder: Embedder) -> None:
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir), HashEncoder(), embedder) as bank:
        await bank.put(mill())
        await bank.put(SHOP_DOCUMENT)
        query = Query("", QUESTION, top_k=2, with_cue=2)
        found = await bank.query(Query("", QUESTION, top_k=2))
        await bank.delete("", "mill")
        result = await inside.cue_finder(bank).add(query, found, embedder.embed(QUESTION)[None])
        assert [[sentence.text for sentence in hit.cue] for hit in result.hits] == [
            [],
            [OPENS, CLOSED],
        ]


@pytest.mark.asyncio
async def test_a_restored_bank_has_the_vectors(data_dir: Path, tmp_path: Path, counting: CountingEmbedder) -> None:
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir), HashEncoder(), counting) as bank:
        await bank.put(mill())
        [progress async for progress in bank.snapshot(str(tmp_path / "snapshot"))]
    list(restore(str(tmp_path / "snapshot"), tmp_path / "restored"))
    counting.taken()
    async with opened(BankConfig(data_dir=tmp_path / "restored"), HashEncoder(), counting) as bank:
        assert await cue(bank, with_cue=1) == {"mill": [WHEEL]} and counting.taken() == [QUESTION]
        assert (await bank.scrub()).num_lost == 0


@pytest.mark.asyncio
async def test_late_sentences_hold_up_no_other_query_and_are_embedded_once(
    data_dir: Path, counting: CountingEmbedder
) -> None:
    data_dir.mkdir()
    config = BankConfig(data_dir=data_dir, embed_sentences=False, embed_threads=2)
    async with opened(config, HashEncoder(), counting) as bank:
        await bank.put(mill())
        await bank.put(SHOP_DOCUMENT)
        counting.taken()
        with counting.sentences_held():
            asked = [asyncio.create_task(cue(bank, OF_BOTH, top_k=2)) for _ in range(8)]
            await within_the_bound(lambda: len(counting.waiting) == 2)
            assert counting.waiting == {"The mill", "The shop"}, "each document is a job of its own"
            async with asyncio.timeout(10):
                assert await cue(bank, "Does it grind rye?", with_cue=0) == {}
            given_up, *others = asked
            given_up.cancel()
        assert await asyncio.gather(*others) == [{"mill": [WHEEL], "shop": [OPENS]}] * 7
        assert len([text for text in counting.taken() if "\n" in text]) == 3 + 2
        assert num_rows(data_dir) == 2


@pytest.mark.asyncio
async def test_queries_whose_sentences_are_too_many_to_wait_for_are_refused(
    data_dir: Path, counting: CountingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cue_finder, "MAX_LATE", 1)
    data_dir.mkdir()
    async with opened(BankConfig(data_dir=data_dir, embed_sentences=False), HashEncoder(), counting) as bank:
        await bank.put(mill())
        await bank.put(SHOP_DOCUMENT)
        with counting.sentences_held():
            asked = [asyncio.create_task(cue(bank, top_k=1)) for _ in range(2)]
            await within_the_bound(lambda: counting.waiting == {"The mill"})
            asked[0].cancel()
            for _ in range(2):  # the cancelled query's document waits on, too
                with pytest.raises(OverloadedError, match="sentences of 1 documents at a time") as refused:
                    await cue(bank, "When does it open?", top_k=1)
                assert refused.value.retry_after_ms > 0
            asked.append(asyncio.create_task(cue(bank, top_k=1)))
            await asyncio.sleep(0.05)
            assert not asked[-1].done(), "it waits for the document that is embedded already"
        assert await asyncio.gather(*asked[1:]) == [{"mill": [WHEEL, "It grinds rye."]}] * 2
        assert await cue(bank, "When does it open?", top_k=1, with_cue=1) == {"shop": [OPENS]}


@pytest.mark.asyncio
async def test_places_count_characters(client: Client) -> None:
    await client.ingest({"id": "owl", "text": " 🦉🦉 Owls hunt mice. Ünder the moon they sleep.\n"})
    (hit,) = (await client.query(text="Who hunts mice?", top_k=2, with_cue=4)).hits
    sentences = [(item.start, item.end, item.text) for item in hit.cue]
    assert sentences == [(1, 19, "🦉🦉 Owls hunt mice."), (20, 46, "Ünder the moon they sleep.")]
