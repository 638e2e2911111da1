from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from bank_service.service.server import BankServer
from bank_service.testing.client import Client, upload_of
from bank_service.testing.hash_encoder import BROKEN, MAX_WORDS, NO_TOKENS, HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.errors import InternalError, InvalidArgumentError, NotFoundError, VersionConflictError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient, record_digest

CREATED = pb.IngestDocumentsResponse.CREATED
UPDATED = pb.IngestDocumentsResponse.UPDATED
UNCHANGED = pb.IngestDocumentsResponse.UNCHANGED


def record_for(text: str, title: str = "", codec: str = DEFAULT_CODEC, learner: str = "a learner") -> bytes:
    encoder = HashEncoder(learner)
    return encode_gradient(encoder.encode([(title, text)])[0].values, encoder.spec, codec)


@pytest.mark.asyncio
async def test_a_document_comes_back_as_it_was_put_with_the_encoders_gradient(client: Client) -> None:
    document = pb.Document(
        id="zoë/1", title="Owls", text="Owls hunt\r\n\tat\x0b\x0cnight. 🦉", metadata={"lang": "en", "": "x"}
    )
    (put,) = await client.ingest(document)
    assert (put.namespace, put.id, put.version, put.outcome, put.sequence) == ("default", "zoë/1", 1, CREATED, 1)
    assert (put.num_tokens, put.truncated) == (5, False)
    got = await client.get("zoë/1")
    document.namespace = "default"
    assert got.document == document
    assert (got.version, got.gradient_digest, got.num_tokens) == (1, put.gradient_digest, 5)
    assert 1.7e9 < got.updated_at.ToSeconds() < 5e9
    ((_, record),) = await client.fetch([put.gradient_digest])
    assert record == record_for(document.text, "Owls")


@pytest.mark.asyncio
async def test_a_text_longer_than_the_encoder_reads_is_told_to_be_truncated(client: Client) -> None:
    put = await client.put("long", "word " * (MAX_WORDS + 1))
    assert (put.num_tokens, put.truncated) == (MAX_WORDS, True)
    assert (await client.get("long")).truncated


@pytest.mark.asyncio
async def test_the_same_content_again_is_free(data_dir: Path, embedder: Embedder) -> None:
    encoder = HashEncoder()
    async with (
        BankServer(BankConfig(data_dir=data_dir), encoder, embedder) as server,
        Client(server.address.target) as client,
    ):
        first = await client.put("a", "some text", metadata={"k": "v"})
        again = await client.put("a", "some text", metadata={"k": "v"})
        stats = await client.stats()
    assert again.outcome == UNCHANGED
    assert (again.version, again.sequence, again.gradient_digest) == (1, first.sequence, first.gradient_digest)
    assert (encoder.batches, stats.sequence) == ([["some text"]], 1)


@pytest.mark.asyncio
async def test_an_update_counts_versions_and_its_old_gradient_goes(server: BankServer, client: Client) -> None:
    first = await client.put("a", "the first text")
    second = await client.put("a", "the second text")
    assert (second.version, second.outcome, second.sequence) == (2, UPDATED, 2)
    assert (await client.get("a")).sequence == 2
    await client.refused(client.fetch([first.gradient_digest]), NotFoundError)
    assert [hit.version for hit in (await client.query(text="first", top_k=5)).hits] == [2]
    assert (await client.stats()).num_gradients == 1


@pytest.mark.asyncio
async def test_new_metadata_alone_keeps_the_gradient_without_encoding(data_dir: Path, embedder: Embedder) -> None:
    encoder = HashEncoder()
    async with (
        BankServer(BankConfig(data_dir=data_dir), encoder, embedder) as server,
        Client(server.address.target) as client,
    ):
        first = await client.put("a", "some text", metadata={"k": "1"})
        second = await client.put("a", "some text", metadata={"k": "2"})
        assert (second.version, second.outcome, second.gradient_digest) == (2, UPDATED, first.gradient_digest)
        assert (await client.get("a")).document.metadata == {"k": "2"}
        assert len(await client.fetch([first.gradient_digest])) == 1
    assert len(encoder.batches) == 1


@pytest.mark.asyncio
async def test_an_empty_id_is_derived_from_title_and_text(client: Client) -> None:
    one, same, other = await client.ingest({"text": "one"}, {"text": "one"}, {"text": "one", "title": "t"})
    assert one.id == same.id and one.id != other.id
    assert (one.outcome, same.outcome, other.outcome) == (CREATED, UNCHANGED, CREATED)
    assert (await client.get(one.id)).document.text == "one"


@pytest.mark.asyncio
async def test_a_document_that_comes_back_goes_on_counting_versions(client: Client) -> None:
    await client.put("a", "one")
    deleted = await client.delete("a")
    assert (deleted.version, deleted.sequence) == (1, 2)
    back = await client.put("a", "one")
    assert (back.version, back.outcome) == (2, CREATED)
    assert len(await client.fetch([back.gradient_digest])) == 1


@pytest.mark.asyncio
async def test_two_documents_with_one_gradient_share_it_until_the_last_goes(client: Client) -> None:
    one, two = await client.put("one", "same text"), await client.put("two", "same text")
    assert one.gradient_digest == two.gradient_digest
    assert (await client.stats()).num_gradients == 1
    await client.delete("one")
    assert len(await client.fetch([two.gradient_digest])) == 1
    await client.delete("two")
    await client.refused(client.fetch([two.gradient_digest]), NotFoundError)


@pytest.mark.asyncio
async def test_many_documents_are_acknowledged_in_order_and_encoded_in_batches(
    data_dir: Path, embedder: Embedder
) -> None:
    encoder = HashEncoder()
    async with (
        BankServer(BankConfig(data_dir=data_dir), encoder, embedder) as server,
        Client(server.address.target) as client,
    ):
        streams = [
            client.ingest(*({"id": f"{stream}-{number}", "text": f"text {stream} {number}"} for number in range(40)))
            for stream in range(3)
        ]
        for stream, responses in enumerate(await asyncio.gather(*streams)):
            assert [response.id for response in responses] == [f"{stream}-{number}" for number in range(40)]
        assert (await client.stats()).num_documents == 120
    assert sum(map(len, encoder.batches)) == 120
    assert max(map(len, encoder.batches)) == 8 and len(encoder.batches) < 60


@pytest.mark.asyncio
async def test_one_id_many_times_in_a_stream_ends_as_the_last_one(client: Client) -> None:
    texts = [f"text {number}" for number in range(20)]
    responses = await client.ingest(*({"id": "a", "text": text} for text in texts))
    assert [response.version for response in responses] == list(range(1, 21))
    assert (await client.get("a")).document.text == "text 19"


@pytest.mark.asyncio
async def test_two_updates_at_once_without_a_version_both_succeed_one_after_the_other(client: Client) -> None:
    responses = await asyncio.gather(*(client.put("a", f"text {number}") for number in range(10)))
    assert sorted(response.version for response in responses) == list(range(1, 11))
    last = max(responses, key=lambda response: response.version)
    assert (await client.get("a")).gradient_digest == last.gradient_digest


@pytest.mark.asyncio
async def test_of_two_updates_at_once_that_expect_a_version_one_is_told_to_retry(client: Client) -> None:
    await client.put("a", "one", expected_version=0)
    results = await asyncio.gather(
        *(client.put("a", f"text {number}", expected_version=1) for number in range(4)), return_exceptions=True
    )
    conflicts = [result for result in results if isinstance(result, VersionConflictError)]
    assert len(conflicts) == 3 and len(results) == 4
    for error in conflicts:
        assert (error.namespace, error.id, error.expected_version, error.actual_version) == ("default", "a", 1, 2)


@pytest.mark.asyncio
@pytest.mark.parametrize(("expected", "actual"), [(0, 1), (2, 1)])
async def test_a_wrong_expected_version_changes_nothing(client: Client, expected: int, actual: int) -> None:
    await client.put("a", "one")
    for call in (
        client.put("a", "two", expected_version=expected),
        client.put("a", "one", expected_version=expected),
        client.delete("a", expected_version=expected),
    ):
        error = await client.refused(call, VersionConflictError)
        assert (error.expected_version, error.actual_version) == (expected, actual)
    assert (await client.get("a")).document.text == "one"
    absent = await client.refused(client.put("b", "text", expected_version=1), VersionConflictError)
    assert absent.actual_version == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("bad", "kind"), [(NO_TOKENS, InvalidArgumentError), (BROKEN, InternalError), ("\0", InvalidArgumentError)]
)
async def test_a_bad_document_fails_its_stream_with_its_index_and_no_other(
    client: Client, bad: str, kind: type[Exception]
) -> None:
    good = [{"id": f"good {number}", "text": f"text {number}"} for number in range(3)]
    other = [{"id": f"other {number}", "text": f"text {number}"} for number in range(10)]
    error, responses = await asyncio.gather(
        client.refused(client.ingest(*good, {"id": "bad", "text": f"x{bad}"}, {"id": "late", "text": "x"}), kind),
        client.ingest(*other),
    )
    assert error.index == 3
    assert len(responses) == 10
    for document in good:
        assert (await client.get(document["id"])).version == 1
    await client.refused(client.get("bad"), NotFoundError)


@pytest.mark.asyncio
async def test_an_uploaded_gradient_is_stored_as_it_is(client: Client) -> None:
    record = record_for("encoded elsewhere")
    one, two = (
        pb.Document(id="one", text="the owl text"),
        pb.Document(id="two", text="the fox text", namespace="elsewhere"),
    )
    answers = await client.upload(*upload_of(one, record), *upload_of(two, record, chunk_bytes=2**20))
    assert [(answer.id, answer.outcome) for answer in answers] == [("one", CREATED), ("two", CREATED)]
    assert await client.fetch([answers[0].gradient_digest]) == [(answers[0].gradient_digest, record)]
    assert decode_gradient(record, HashEncoder().spec).std() > 0.5
    (hit,) = (await client.query(text="fox", top_k=5, namespace="elsewhere")).hits
    assert hit.id == "two" and hit.score > 0.4
    (again,) = await client.upload(*upload_of(one, record))
    assert again.outcome == UNCHANGED
    assert [answer.relative_error for answer in (*answers, again)] == [0, 0, 0]
    assert all(answer.HasField("relative_error") for answer in (*answers, again))
    assert not (await client.put("own", "a text")).HasField("relative_error")


@pytest.mark.asyncio
@pytest.mark.parametrize("codec", ["fp32", "factors-4-4-8"])
async def test_an_uploaded_gradient_of_another_codec_becomes_factors_and_its_error_is_told(
    client: Client, codec: str
) -> None:
    spec = spec_of()
    document, given = pb.Document(id="one", text="the owl text"), record_for("encoded elsewhere", codec=codec)
    (answer,) = await client.upload(*upload_of(document, given))
    ((digest, record),) = await client.fetch([answer.gradient_digest])
    values, stored = decode_gradient(given, spec), decode_gradient(record, spec)
    assert digest == record_digest(record) and record == encode_gradient(values, spec, DEFAULT_CODEC)
    expected = np.linalg.norm(stored - values) / np.linalg.norm(values)
    assert answer.relative_error == pytest.approx(float(expected), rel=1e-5) and 0.1 < expected < 1
    (again,) = await client.upload(*upload_of(document, given))
    assert (again.outcome, again.relative_error) == (UNCHANGED, answer.relative_error)
    (same,) = await client.upload(*upload_of(document, record))
    assert (same.outcome, same.relative_error) == (UNCHANGED, 0)


@pytest.mark.asyncio
async def test_at_full_rank_a_dense_upload_loses_only_what_rounding_takes(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, codec="factors-4-4-8")
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        (answer,) = await client.upload(*upload_of(pb.Document(text="a text"), record_for("x", codec="fp32")))
        zeros = encode_gradient(np.zeros(spec_of().num_values, np.float32), spec_of(), "fp32")
        (nothing,) = await client.upload(*upload_of(pb.Document(text="another"), zeros))
    assert 0 < answer.relative_error < 0.01 and nothing.relative_error == 0


@pytest.mark.asyncio
async def test_a_dense_upload_that_has_no_factors_is_refused(client: Client) -> None:
    huge = encode_gradient(np.full(spec_of().num_values, 1e30, np.float32), spec_of(), "fp32")
    error = await client.refused(client.upload(*upload_of(pb.Document(text="a text"), huge)), InvalidArgumentError)
    assert error.field == "chunk" and "values must be at most 2**50" in str(error)


@pytest.mark.asyncio
@pytest.mark.parametrize("metadata", [{}, {"by": "me"}])
async def test_a_text_put_after_its_upload_gets_a_gradient_of_its_own(client: Client, metadata: dict[str, str]) -> None:
    right = await client.put("elsewhere", "text of one")
    (wrong,) = await client.upload(*upload_of(pb.Document(id="one", text="text of one"), record_for("another")))
    healed = await client.put("one", "text of one", metadata=metadata)
    assert (healed.outcome, healed.version) == (UPDATED, wrong.version + 1)
    assert healed.gradient_digest == right.gradient_digest != wrong.gradient_digest
    assert (await client.put("one", "text of one", metadata=metadata)).outcome == UNCHANGED


@pytest.mark.asyncio
async def test_an_uploaded_embedding_places_the_document(client: Client, embedder: Embedder) -> None:
    vector = embedder.embed("volcanoes of Iceland") * 7
    document = pb.Document(id="a", text="something else entirely")
    (first,) = await client.upload(*upload_of(document, record_for("x"), embedding=vector.tolist()))
    (hit,) = (await client.query(text="volcanoes of Iceland", top_k=1)).hits
    assert hit.score == pytest.approx(1, abs=1e-5)
    (second,) = await client.upload(*upload_of(document, record_for("x"), embedding=embedder.embed("tea").tolist()))
    assert (first.outcome, second.outcome, second.version) == (CREATED, UPDATED, 2)
    assert (await client.query(text="tea", top_k=1)).hits[0].score == pytest.approx(1, abs=1e-5)


@pytest.mark.asyncio
async def test_a_caller_that_goes_away_leaves_the_bank_consistent(server: BankServer, client: Client) -> None:
    async def endless() -> None:
        number = 0
        call = client.stub.IngestDocuments()
        while True:
            await call.write(pb.IngestDocumentsRequest(document=pb.Document(id=f"d{number}", text=f"text {number}")))
            number += 1

    task = asyncio.create_task(endless())
    while (await client.stats()).num_documents < 20:
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for _ in range(100):  # what is under way comes to its end
        before = await client.stats()
        await asyncio.sleep(0.1)
        after = await client.stats()
        if before.sequence == after.sequence == after.indexed_sequence:
            break
    assert after.num_documents == after.sequence >= 20
    entries = (await client.list(page_size=1000)).documents
    assert len({entry.id for entry in entries}) == after.num_documents
    hits = (await client.query(text="text", top_k=20, include_gradients=True)).hits
    assert len(hits) == 20 and all(hit.gradient for hit in hits)
