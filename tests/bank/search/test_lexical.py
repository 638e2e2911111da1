"""BM25 and hybrid retrieval, by a real bank."""

from __future__ import annotations

import pytest

from bank_service.testing.client import Client
from bank_service.wire.generated import bank_pb2 as pb
from tests.bank.search.plain_words import bm25
from tests.bank.search.test_query import FACTS, put_facts


async def lexical(client: Client, text: str, **fields: object) -> list[tuple[str, float]]:
    found = await client.query(text=text, retrieval=pb.LEXICAL, **({"top_k": 64} | fields))
    return [(hit.id, hit.score) for hit in found.hits]


@pytest.mark.asyncio
async def test_scores_are_bm25_over_the_namespace_alone(client: Client) -> None:
    texts = ["owl owl mice", "mice in the barn", "a bridge of stone", "the owl of the barn at night", "sugar", "comet"]
    await client.ingest(*({"id": str(number), "text": text} for number, text in enumerate(texts)))
    expected = bm25({number: text.split() for number, text in enumerate(texts)}, ["owl", "barn"])
    before = await lexical(client, "Owl, barn!")
    assert [id for id, _ in before] == sorted("013", key=lambda id: -expected[int(id)])
    assert [score for _, score in before] == pytest.approx([expected[int(id)] for id, _ in before], rel=1e-5)
    # Documents of another namespace must not change this one's scores.
    await client.ingest(*({"id": f"x{n}", "text": "owl barn " * (n + 1), "namespace": "tenant"} for n in range(20)))
    assert await lexical(client, "Owl, barn!") == before
    await client.put("gone", "owl barn owl")
    await client.delete("gone")
    assert await lexical(client, "Owl, barn!") == before


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "text",
    ['owl" OR "comet', "owl NOT owl", "text:owl", "owl*", "NEAR(owl mice, 2)", "owl AND nothing", "-owl", "(owl",
     "^owl", "owl'; DROP TABLE documents; --", "owl " + "filler " * 5000],
)  # fmt: skip
async def test_nothing_in_a_text_is_an_operator(client: Client, text: str) -> None:
    await put_facts(client)
    found = {id for id, _ in await lexical(client, text)}
    assert "owl" in found and found <= {"owl", "comet"}
    assert ("comet" in found) == ("comet" in text)


@pytest.mark.asyncio
@pytest.mark.parametrize("text", ["!?", "_", '""', "OR", "quux"])
async def test_a_text_without_a_known_word_finds_nothing_by_words(client: Client, text: str) -> None:
    await put_facts(client)
    assert await lexical(client, text) == []
    hybrid = await client.query(text=text, top_k=4, retrieval=pb.HYBRID)
    assert [hit.id for hit in hybrid.hits] == [hit.id for hit in (await client.query(text=text, top_k=4)).hits]


@pytest.mark.asyncio
async def test_words_are_those_of_title_and_text_now(client: Client) -> None:
    await client.put("a", "old words", title="Heading")
    assert [id for id, _ in await lexical(client, "heading")] == ["a"]
    await client.put("a", "new words")
    assert await lexical(client, "old heading") == []
    assert [id for id, _ in await lexical(client, "NEW")] == ["a"]
    await client.delete("a")
    assert await lexical(client, "new") == []
    await client.put("a", "Größe")
    assert [id for id, _ in await lexical(client, "grosse große GRÖSSE größe")] == ["a"]


@pytest.mark.asyncio
async def test_every_hit_has_its_cosine_and_min_score_is_one(client: Client) -> None:
    await put_facts(client)
    dense = {hit.id: hit.score for hit in (await client.query(text="the owl and the comet", top_k=4)).hits}
    for kind in (pb.DENSE, pb.LEXICAL, pb.HYBRID):
        hits = (await client.query(text="the owl and the comet", top_k=4, retrieval=kind)).hits
        assert len(hits) >= 2 and {hit.id: hit.cosine for hit in hits} == pytest.approx(
            {hit.id: dense[hit.id] for hit in hits}
        )
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        threshold = sorted(hit.cosine for hit in hits)[-1] - 1e-4
        best = (await client.query(text="the owl and the comet", top_k=4, retrieval=kind, min_score=threshold)).hits
        assert [hit.id for hit in best] == [max(dense, key=lambda id: dense[id])]
    (named,) = (await client.query(document_ids=["owl"])).hits
    assert (named.score, named.cosine) == (1, 1)


@pytest.mark.asyncio
async def test_hybrid_is_reciprocal_rank_fusion_of_the_two_lists(client: Client) -> None:
    await put_facts(client)
    text = "stone from the harvest"
    ranks: dict[str, float] = {}
    for found in (await client.query(text=text, top_k=4)).hits, await lexical(client, text):
        for rank, item in enumerate(found, 1):
            id = item[0] if isinstance(item, tuple) else item.id
            ranks[id] = ranks.get(id, 0) + 1 / (60 + rank)
    hits = (await client.query(text=text, top_k=4, retrieval=pb.HYBRID)).hits
    assert {hit.id: hit.score for hit in hits} == pytest.approx(ranks)
    assert len(set(ranks.values())) > 1 and set(ranks) == set(FACTS)
