from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import spec_of
from bank_service.values.embedder import Embedder
from bank_service.wire.errors import LearnerMismatchError, LimitExceededError, NotFoundError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, record_digest, verify_record
from tests.spans import recorded_spans

FACTS = {
    "owl": "The barn owl hunts mice at night by hearing alone.",
    "bridge": "The old bridge of Mostar was rebuilt from the same stone in 2004.",
    "sugar": "Sugar cane is pressed within a day of its harvest.",
    "comet": "The comet's tail points away from the sun.",
}


async def put_facts(client: Client, namespace: str = "") -> dict[str, str]:
    """id → digest."""
    responses = await client.ingest(
        *({"id": id, "title": id.title(), "text": text, "namespace": namespace} for id, text in FACTS.items())
    )
    return {response.id: response.gradient_digest for response in responses}


@pytest.mark.asyncio
async def test_the_nearest_documents_come_best_first(client: Client) -> None:
    digests = await put_facts(client)
    response = await client.query(text="Which bird catches mice in the dark?", top_k=3)
    assert response.hits[0].id == "owl" and len(response.hits) == 3
    scores = [hit.score for hit in response.hits]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1] + 0.1
    hit = response.hits[0]
    assert (hit.version, hit.gradient_digest) == (1, digests["owl"])
    assert (hit.gradient, hit.title, hit.text) == (b"", "", "")
    assert (response.learner_fingerprint, response.sequence) == (spec_of().fingerprint, 4)


@pytest.mark.asyncio
async def test_text_and_gradients_come_along_where_asked_for(client: Client) -> None:
    digests = await put_facts(client)
    response = await client.query(text="comet", top_k=2, include_gradients=True, include_text=True)
    for hit in response.hits:
        assert (hit.title, hit.text) == (hit.id.title(), FACTS[hit.id])
        assert record_digest(hit.gradient) == hit.gradient_digest == digests[hit.id]
        assert verify_record(hit.gradient, spec_of()).record_bytes == hit.gradient_bytes
    before = (await client.stats()).cache_hits
    await client.query(text="comet", top_k=2, include_gradients=True)
    assert (await client.stats()).cache_hits == before + 2


@pytest.mark.asyncio
async def test_a_vector_finds_what_its_text_finds(client: Client, embedder: Embedder) -> None:
    await put_facts(client)
    by_text = await client.query(text="stone bridge", top_k=4)
    by_vector = await client.query(vector=(embedder.embed("stone bridge") * 3).tolist(), top_k=4)
    assert [hit.id for hit in by_text.hits] == [hit.id for hit in by_vector.hits]
    np.testing.assert_allclose([h.score for h in by_text.hits], [h.score for h in by_vector.hits], atol=1e-6)


LINES = [f"2026-11-29 worker {n} WARN connection reset by peer, retry {n} in {n * 7} ms" for n in range(200)]
QUESTION = "Which bird catches mice in the dark?"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "text",
    [
        "\n".join([*LINES, QUESTION]),
        "\n".join([*LINES, "", QUESTION, "Thank you!"]),
        "\n".join([QUESTION, *LINES]),
        " ".join([*LINES, QUESTION]),
        ". ".join([*LINES, QUESTION]),
    ],
    ids=["behind", "with thanks", "before", "in one line", "in sentences"],
)
async def test_a_question_beside_a_long_log_is_searched_for(client: Client, text: str) -> None:
    assert len(text.split()) > 2000
    await put_facts(client)
    sequence = (await client.stats()).sequence
    for fields in ({}, {"as_of": sequence}, {"retrieval": pb.LEXICAL}, {"retrieval": pb.HYBRID}):
        hits = (await client.query(text=text, top_k=2, **fields)).hits
        assert hits[0].id == "owl", fields
    (answer,) = await client.query_batch({"text": text, "top_k": 4})
    assert answer.hits[0].id == "owl" and len(answer.hits) == 4
    assert [hit.score for hit in answer.hits] == sorted((hit.score for hit in answer.hits), reverse=True)


@pytest.mark.asyncio
async def test_a_long_query_searches_by_words_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    await put_facts(client)
    spans = recorded_spans(monkeypatch)
    text = "\n".join([*LINES, QUESTION])
    dense = (await client.query(text=text, top_k=1)).hits[0]
    for retrieval in (pb.LEXICAL, pb.HYBRID):
        spans.clear()
        hit = (await client.query(text=text, top_k=2, retrieval=retrieval)).hits[0]
        assert (hit.id, hit.cosine) == (dense.id, pytest.approx(dense.cosine)), "the best cosine of all parts"
        assert [span.name for span in spans.get_finished_spans()].count("catalog.words") == 1


@pytest.mark.asyncio
async def test_documents_named_by_id_come_in_the_order_named_with_score_1(client: Client) -> None:
    await put_facts(client)
    response = await client.query(document_ids=["sugar", "owl"], include_text=True)
    assert [(hit.id, hit.score, hit.text) for hit in response.hits] == [
        ("sugar", 1.0, FACTS["sugar"]),
        ("owl", 1.0, FACTS["owl"]),
    ]
    error = await client.refused(client.query(document_ids=["owl", "nobody", "none"]), NotFoundError)
    assert (error.kind, error.name) == ("document", "nobody")


@pytest.mark.asyncio
async def test_hits_below_min_score_are_left_out(client: Client) -> None:
    await put_facts(client)
    everything = (await client.query(text="mice", top_k=64, min_score=-1)).hits
    assert len(everything) == 4
    threshold = (everything[0].score + everything[1].score) / 2
    assert [hit.id for hit in (await client.query(text="mice", top_k=64, min_score=threshold)).hits] == ["owl"]
    assert not (await client.query(text="mice", top_k=64, min_score=1)).hits


@pytest.mark.asyncio
async def test_a_namespace_is_searched_alone_and_fully(client: Client) -> None:
    await client.ingest(*({"id": f"mouse {n}", "text": f"mouse number {n}", "namespace": "big"} for n in range(50)))
    await put_facts(client, "small")
    assert {hit.id for hit in (await client.query(text="mouse", top_k=4, namespace="small")).hits} == set(FACTS)
    assert len((await client.query(text="mouse", top_k=64, namespace="big")).hits) == 50
    await client.refused(client.query(document_ids=["owl"], namespace="big"), NotFoundError)


@pytest.mark.asyncio
async def test_the_default_namespace_always_exists_and_others_once_they_had_a_document(client: Client) -> None:
    assert not (await client.query(text="x", top_k=1)).hits
    assert not (await client.list()).documents
    for call in (
        client.query(text="x", top_k=1, namespace="new"),
        client.query(document_ids=["x"], namespace="new"),
        client.get("x", namespace="new"),
        client.list(namespace="new"),
        client.delete("x", namespace="new"),
    ):
        error = await client.refused(call, NotFoundError)
        assert (error.kind, error.name) == ("namespace", "new")
    await client.put("x", "text", namespace="new")
    await client.delete("x", namespace="new")
    assert not (await client.query(text="x", top_k=1, namespace="new")).hits
    for call in (client.get("x", namespace="new"), client.delete("x", namespace="new")):
        error = await client.refused(call, NotFoundError)
        assert (error.kind, error.name) == ("document", "x")


@pytest.mark.asyncio
async def test_a_query_for_another_learner_is_refused_with_both_fingerprints(client: Client) -> None:
    await put_facts(client)
    mine, other = spec_of().fingerprint, spec_of("another").fingerprint
    assert (await client.query(text="owl", top_k=1, learner_fingerprint=mine)).hits
    error = await client.refused(client.query(text="owl", top_k=1, learner_fingerprint=other), LearnerMismatchError)
    assert (error.expected, error.actual) == (mine, other)
    assert mine in error.message and other in error.message


@pytest.mark.asyncio
async def test_every_query_sees_what_was_acknowledged_before_it(client: Client) -> None:
    async def writer(name: str) -> None:
        generator = random.Random(name)
        alive = False
        for number in range(15):
            if alive and generator.random() < 0.4:
                await client.delete(name)
                alive = False
            else:
                put = await client.put(name, f"{name} says {number}")
                alive = True
            hits = {hit.id: hit for hit in (await client.query(text=name, top_k=64)).hits}
            assert (name in hits) == alive
            if alive:
                assert (hits[name].version, hits[name].gradient_digest) == (put.version, put.gradient_digest)

    await asyncio.gather(*(writer(name) for name in ("anna", "bert", "carl", "dora", "emil", "fred")))


@pytest.mark.asyncio
async def test_many_callers_query_at_once_while_documents_change(client: Client) -> None:
    await put_facts(client)
    stop = asyncio.Event()

    async def churn() -> None:
        number = 0
        while not stop.is_set():
            await client.put("churn", f"mice and more mice {number}")
            if number % 3 == 2:
                await client.delete("churn")
            number += 1

    churning = asyncio.create_task(churn())
    responses = await asyncio.gather(
        *(client.query(text=f"mice {n % 7}", top_k=4, include_gradients=True) for n in range(150))
    )
    stop.set()
    await churning
    for response in responses:
        assert len(response.hits) == 4 and "owl" in {hit.id for hit in response.hits}
        assert all(record_digest(hit.gradient) == hit.gradient_digest for hit in response.hits)


@pytest.mark.asyncio
async def test_texts_too_large_for_one_message_are_refused_and_fewer_are_sent(client: Client) -> None:
    await client.ingest(*({"id": f"big {n}", "text": f"{n} " + "x" * 1_000_000} for n in range(36)))
    error = await client.refused(client.query(text="x", top_k=36, include_text=True), LimitExceededError)
    assert error.limit == "max_message_bytes"
    response = await client.query(text="x", top_k=20, include_text=True)
    assert len(response.hits) == 20 and response.ByteSize() > 20_000_000


@pytest.mark.asyncio
async def test_a_list_goes_through_the_documents_in_order_of_id(client: Client) -> None:
    ids = [f"doc {number:02}" for number in range(25)] + ["émile", "zoë", "Ω"]
    await client.ingest(*({"id": id, "text": id * 2, "title": id} for id in reversed(ids)))
    await client.put("gone", "x")
    await client.delete("gone")
    found, token = [], ""
    for size in (10, 10, 8):
        page = await client.list(page_size=10, page_token=token)
        assert len(page.documents) == size
        found += page.documents
        token = page.next_page_token
    assert token == ""
    assert [entry.id for entry in found] == sorted(ids, key=str.encode)
    assert all(entry.title == entry.id and entry.version == 1 for entry in found)
    assert all(entry.num_text_bytes == len((entry.id * 2).encode()) for entry in found)


@pytest.mark.asyncio
async def test_stats_count_what_is_there(client: Client) -> None:
    await put_facts(client, "facts")
    await client.put("x", FACTS["owl"])
    await client.put("y", "gone soon", namespace="emptied")
    await client.delete("y", namespace="emptied")
    stats = await client.stats()
    assert {space.namespace: space.num_documents for space in stats.namespaces} == {
        "default": 1,
        "emptied": 0,
        "facts": 4,
    }
    (hit,) = (await client.query(document_ids=["x"])).hits
    assert (stats.num_documents, stats.num_gradients, stats.gradient_bytes) == (5, 5, 5 * hit.gradient_bytes)
    assert (stats.sequence, stats.codec, stats.embedding_dimension) == (7, DEFAULT_CODEC, 384)
    assert (stats.learner_fingerprint, stats.layout_id) == (spec_of().fingerprint, spec_of().layout_id)
    assert stats.embedder.startswith("all-MiniLM-L6-v2-onnx-int8@") and stats.cache_available and stats.version
    assert stats.free_disk_bytes > 2**20
