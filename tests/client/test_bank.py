"""Both clients against one real bank: what goes in comes out, and the bank's errors arrive as they are."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from bank_service.errors import InvalidArgumentError, LearnerMismatchError, NotFoundError, VersionConflictError
from bank_service.testing.hash_encoder import spec_of
from bank_service.wire.record import DEFAULT_CODEC, WrongLearnerError, encode_gradient, record_digest
from regrad_vllm.client import AsyncBank, Bank, Condition, Document, Query
from tests.client.conftest import Call

pytestmark = pytest.mark.asyncio

HARBOUR = Document("harbour", "The harbour master of Orlen is Ada Quist.", "Orlen", {"lang": "en"})
LAMP = Document("lamp", "The lamp of the lighthouse is new.", metadata={"lang": "de"})
ROPE = Document("rope", "Ropes are made of hemp.")


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """Of this test alone."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[-64:]


async def test_documents_are_stored_updated_found_and_deleted(call: Call, namespace: str) -> None:
    created = await call("ingest", [HARBOUR, LAMP], namespace=namespace)
    assert [(r.id, r.version, r.outcome) for r in created] == [("harbour", 1, "created"), ("lamp", 1, "created")]
    assert created[0].num_tokens == 8 and not created[0].truncated
    updated = await call("ingest", [Document("lamp", "It broke."), HARBOUR], namespace=namespace)
    assert [(r.id, r.version, r.outcome) for r in updated] == [("lamp", 2, "updated"), ("harbour", 1, "unchanged")]
    assert updated[1].sequence == created[0].sequence and updated[0].sequence > created[1].sequence

    got = await call("get", "harbour", namespace=namespace)
    assert got.document == HARBOUR and got.version == 1 and got.sequence == created[0].sequence
    assert got.gradient_digest == created[0].gradient_digest
    assert abs(datetime.now(UTC) - got.updated_at) < timedelta(minutes=5)

    deletion = await call("delete", "lamp", namespace=namespace)
    assert deletion.version == 2 and deletion.sequence > updated[0].sequence
    assert [entry.id for entry in await call("list", namespace=namespace)] == ["harbour"]
    stats = await call("stats")
    assert stats.namespaces[namespace] == 1 and stats.learner_fingerprint == spec_of().fingerprint


async def test_a_document_of_another_version_than_expected_is_not_replaced(call: Call, namespace: str) -> None:
    (created,) = await call("ingest", [Document("lamp", "It is red.", expected_version=0)], namespace=namespace)
    for version in (0, 2):
        with pytest.raises(VersionConflictError):
            await call("ingest", [Document("lamp", "It broke.", expected_version=version)], namespace=namespace)
    (updated,) = await call("ingest", [Document("lamp", "It broke.", expected_version=1)], namespace=namespace)
    assert (created.version, updated.version) == (1, 2)
    record = (await call("fetch", [updated.gradient_digest]))[0][1]
    for version, error in ((1, VersionConflictError), (2, None)):
        given = [(Document("lamp", "It glows.", expected_version=version), record)]
        with pytest.raises(error) if error else nullcontext():
            await call("ingest_gradients", given, namespace=namespace)


async def test_a_document_without_an_id_gets_one_from_its_content(call: Call, namespace: str) -> None:
    (receipt,) = await call("ingest", [Document("", "A text.")], namespace=namespace)
    assert receipt.id.startswith("sha256-")


async def test_a_listing_has_every_document_once_whatever_the_page(call: Call, namespace: str) -> None:
    ids = [f"d{n}" for n in range(5)]
    await call("ingest", [Document(id, f"text of {id}", "T") for id in ids], namespace=namespace)
    for page_size in (1, 2, 5, 1000):
        listed = await call("list", namespace=namespace, page_size=page_size)
        assert [entry.id for entry in listed] == ids
    assert (listed[0].title, listed[0].num_text_bytes, listed[0].version) == ("T", len("text of d0"), 1)
    await call("ingest", [Document("d2/a", "a"), Document("e", "e")], namespace=namespace)
    listed = await call("list", namespace=namespace, page_size=1, prefix="d", after="d1")
    assert [entry.id for entry in listed] == ["d2", "d2/a", "d3", "d4"]
    assert [entry.id for entry in await call("list", namespace=namespace, prefix="d2")] == ["d2", "d2/a"]


async def test_a_listing_has_the_metadata_and_keeps_to_conditions(call: Call, namespace: str) -> None:
    languages = {"a": "de", "b": "fr", "c": "de"}
    await call(
        "ingest", [Document(id, id, metadata={"lang": lang}) for id, lang in languages.items()], namespace=namespace
    )
    german = (Condition("lang", "equals", ("de",)),)
    listed = await call("list", namespace=namespace, page_size=1, conditions=german)
    assert [(entry.id, entry.metadata) for entry in listed] == [("a", {"lang": "de"}), ("c", {"lang": "de"})]


async def test_a_deletion_that_expects_another_version_is_refused(call: Call, namespace: str) -> None:
    await call("ingest", [LAMP, Document("lamp", "It broke.")], namespace=namespace, in_flight=1)
    with pytest.raises(VersionConflictError):
        await call("delete", "lamp", namespace=namespace, expected_version=1)
    assert (await call("delete", "lamp", namespace=namespace, expected_version=2)).version == 2


async def test_a_query_finds_by_text_by_words_by_condition_by_id_and_in_the_past(call: Call, namespace: str) -> None:
    receipts = await call("ingest", [HARBOUR, LAMP, ROPE], namespace=namespace, in_flight=1)  # one after another
    text = "Who is the harbour master of Orlen?"
    answer = await call("query", Query(text, namespace=namespace, top_k=2, with_text=True))
    assert len(answer.hits) == 2 and answer.sequence >= receipts[-1].sequence
    best = answer.hits[0]
    assert (best.id, best.title, best.text) == (HARBOUR.id, HARBOUR.title, HARBOUR.text)
    assert best.gradient_digest == receipts[0].gradient_digest and best.score == best.cosine > 0.5
    by_words = await call("query", Query("hemp", namespace=namespace, retrieval="lexical"))
    assert [hit.id for hit in by_words.hits] == ["rope"] and by_words.hits[0].score != by_words.hits[0].cosine
    conditions = (Condition("lang", "equals", ("de", "fr")),)
    german = await call("query", Query(text, namespace=namespace, conditions=conditions))
    assert [hit.id for hit in german.hits] == ["lamp"]
    named = await call("query", Query(namespace=namespace, document_ids=("rope", "lamp")))
    assert [(hit.id, hit.score, hit.text) for hit in named.hits] == [("rope", 1, ""), ("lamp", 1, "")]
    past = await call("query", Query(text, namespace=namespace, as_of=receipts[0].sequence))
    assert [hit.id for hit in past.hits] == ["harbour"] and past.sequence == receipts[0].sequence


async def test_a_text_alone_is_a_query_for_the_three_best_of_the_default_namespace(call: Call) -> None:
    await call("ingest", [Document(f"default-{n}", f"a lighthouse, number {n}") for n in range(4)])
    assert len((await call("query", "a lighthouse")).hits) == 3


async def test_the_banks_errors_come_back_as_they_are(call: Call) -> None:
    with pytest.raises(NotFoundError) as caught:
        await call("query", Query("x", namespace="nowhere"))
    assert (caught.value.kind, caught.value.name) == ("namespace", "nowhere")
    for method in ("get", "delete"):
        with pytest.raises(NotFoundError) as caught:
            await call(method, "nobody")
        assert caught.value.kind == "document"
    with pytest.raises(NotFoundError) as caught:
        await call("fetch", ["0" * 64])
    assert caught.value.kind == "gradient"
    with pytest.raises(InvalidArgumentError) as refused:
        await call("query", Query("x", top_k=1000))
    assert refused.value.field == "top_k"
    for make, field in (
        (lambda: Condition("place", "prefix"), "operator"),  # type: ignore[arg-type]
        (lambda: Query("x", retrieval="sparse"), "retrieval"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgumentError, match="must be one of") as refused:
            make()
        assert refused.value.field == field
    with pytest.raises(InvalidArgumentError, match="at most 1048576 bytes, got 50000000 characters") as refused:
        await call("ingest", [Document("long", "x" * 50_000_000)])
    assert refused.value.field == "text"


async def test_gradients_that_are_made_elsewhere_are_stored_and_fetched_in_the_order_asked_for(
    call: Call, namespace: str
) -> None:
    spec, rng = spec_of(), np.random.default_rng(1)
    records = {
        f"g{n}": encode_gradient(rng.standard_normal(spec.num_values).astype(np.float32), spec, DEFAULT_CODEC)
        for n in range(12)  # more than are in flight
    }
    gradients = [(Document(id, f"text of {id}"), record) for id, record in records.items()]
    receipts = await call("ingest_gradients", gradients, namespace=namespace)
    digests = {receipt.id: receipt.gradient_digest for receipt in receipts}
    assert digests == {id: record_digest(record) for id, record in records.items()}
    fetched = await call("fetch", [digests["g7"], digests["g2"]])
    assert fetched == [(digests["g7"], records["g7"]), (digests["g2"], records["g2"])]


async def test_a_bank_of_another_learner_is_noticed_by_the_query_and_by_the_fetch(address: str) -> None:
    other = spec_of("another learner")
    with Bank(address) as bank:
        (receipt,) = bank.ingest([HARBOUR], namespace="learners")
        with pytest.raises(ValueError, match="fetch must know the learner"):
            list(bank.fetch([receipt.gradient_digest]))
    with Bank(address, spec=other) as bank:
        with pytest.raises(LearnerMismatchError) as caught:
            bank.query(Query("x", namespace="learners"))
        assert {caught.value.expected, caught.value.actual} == {spec_of().fingerprint, other.fingerprint}
        with pytest.raises(WrongLearnerError):
            list(bank.fetch([receipt.gradient_digest]))
    async with AsyncBank(address, spec=other) as bank:
        with pytest.raises(LearnerMismatchError):
            await bank.query(Query("x", namespace="learners"))
        with pytest.raises(WrongLearnerError):
            _ = [record async for record in bank.fetch([receipt.gradient_digest])]


async def test_a_snapshot_reports_until_it_is_whole(call: Call, namespace: str, tmp_path: Path) -> None:
    await call("ingest", [HARBOUR], namespace=namespace)
    last = (await call("snapshot", str(tmp_path / "copy")))[-1]
    assert last.is_whole and last.num_done == last.num_gradients >= 1 and len(last.catalog_digest) == 64
    assert (tmp_path / "copy" / "manifest.json").exists()


async def test_a_recoding_reports_until_it_is_finished(call: Call, namespace: str) -> None:
    (before,) = await call("ingest", [HARBOUR], namespace=namespace)
    codec = "factors-2-2-8" if (await call("stats")).codec != "factors-2-2-8" else "factors-2-2-4"
    last = (await call("recode", codec))[-1]
    assert last.finished and last.num_recoded >= 1 and not last.num_failed
    assert (await call("stats")).codec == codec
    assert (await call("get", "harbour", namespace=namespace)).gradient_digest != before.gradient_digest
    await call("recode", DEFAULT_CODEC)


async def test_an_upgrade_reports_until_it_is_level_and_is_taken_back(call: Call, tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    last = (await call("upgrade", "begin", str(tmp_path / "next")))[-1]
    assert last.is_level and last.next_fingerprint == spec_of("next").fingerprint
    assert (await call("upgrade"))[-1].num_done == last.num_versions
    assert (await call("upgrade", "back"))[-1].next_fingerprint == ""


@pytest.mark.parametrize("query", [{"text": ""}, {"text": "x", "document_ids": ("a",)}])
async def test_a_query_is_a_text_or_ids(query: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="either text or document_ids"):
        Query(**query)  # type: ignore[arg-type]
