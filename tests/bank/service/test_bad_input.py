"""Every violation of the contract, over the wire, against one bank that goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.testing.hash_encoder import HashEncoder, spec_of
from bank_service.wire import limits
from bank_service.wire.errors import (
    InternalError,
    InvalidArgumentError,
    LearnerMismatchError,
    LimitExceededError,
    NotFoundError,
)
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, HEADER_BYTES, encode_gradient, max_record_bytes

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAN = float("nan")
INF = float("inf")


def condition(times: int = 1, **changed: Any) -> pb.Filter:
    fields = {"key": "k", "operator": pb.Filter.Condition.EQUALS, "values": ["v"]} | changed
    return pb.Filter(conditions=[pb.Filter.Condition(**fields)] * times)


@pytest_asyncio.fixture(loop_scope="module")
async def bank(shared_client: Client) -> AsyncIterator[Client]:
    """The shared bank, which must serve others while a test is at it and afterwards."""
    await shared_client.put("always", "always there")
    yield shared_client
    assert (await shared_client.query(text="always there", top_k=1)).hits[0].id == "always"
    assert (await shared_client.stats()).num_documents == 1


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"text": ""}, "document.text", "must not be empty or blank, got 0"),
        ({"text": " \n\t"}, "document.text", "must not be empty or blank"),
        ({"text": "a\0b"}, "document.text", r"control characters.*got U\+0000 at character 1"),
        ({"text": "\x7fELF\x02\x01"}, "document.text", r"got U\+007F"),
        ({"text": "x\x1b[0m"}, "document.text", r"got U\+001B"),
        ({"text": "It\x92s"}, "document.text", r"got U\+0092 at character 2; remove them"),
        ({"text": "x" * (limits.MAX_TEXT_BYTES + 1)}, "document.text", "at most 1048576 bytes of UTF-8, got 1048577"),
        ({"text": "ä" * (limits.MAX_TEXT_BYTES // 2 + 1)}, "document.text", "at most 1048576 bytes"),
        ({"text": "x" * 3_000_000}, "document.text", "at most 1048576 bytes of UTF-8, got 3000000"),
        ({"title": "x" * 1025}, "document.title", "at most 1024 bytes of UTF-8, got 1025"),
        ({"title": "a\x01"}, "document.title", "control characters"),
        ({"id": "x" * 257}, "document.id", "at most 256 bytes of UTF-8, got 257"),
        ({"id": "ä" * 129}, "document.id", "at most 256 bytes"),
        ({"id": "a\nb\0"}, "document.id", "control characters"),
        ({"namespace": "a b"}, "document.namespace", r"\[a-zA-Z0-9._-\]\{1,64\}, got 'a b'"),
        ({"namespace": "../etc"}, "document.namespace", "got '../etc'"),
        ({"namespace": "x" * 65}, "document.namespace", "1,64"),
        ({"namespace": "x\n"}, "document.namespace", "1,64"),
        ({"metadata": {str(n): "" for n in range(33)}}, "document.metadata", "at most 32 pairs, got 33"),
        ({"metadata": {"k": "x" * 4096}}, "document.metadata", "at most 4096 bytes in all, got 4097"),
        (
            {"metadata": {"regrad.file": "x" * 4097}},
            "document.metadata",
            "'regrad.file'. must be at most 4096 bytes",
        ),
        ({"metadata": {"k": "a\0"}}, "document.metadata", "control characters"),
    ],
)
async def test_a_document_out_of_its_limits_is_refused(
    bank: Client, fields: dict[str, Any], field: str, message: str
) -> None:
    document = {"id": "bad", "text": "fine"} | fields
    error = await bank.refused(bank.ingest(document), InvalidArgumentError)
    assert (error.field, error.index) == (field, 0)
    with pytest.raises(InvalidArgumentError, match=message):
        raise error
    assert len(error.message) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "x" * 256, "title": "x" * 1024, "namespace": "A-z.0_" + "x" * 58},
        {"text": "x" * limits.MAX_TEXT_BYTES},
        {"metadata": {str(n): "" for n in range(32)}},
        {"metadata": {"k": "x" * 4095}},
        {"metadata": {"k": "x" * 4095, "regrad.source": "/" * 4096, "regrad.file": "x" * 4096}},
    ],
)
async def test_a_document_at_its_limits_is_stored(bank: Client, fields: dict[str, Any]) -> None:
    document = {"id": "good", "text": "fine"} | fields
    (put,) = await bank.ingest(document)
    await bank.delete(put.id, namespace=put.namespace)


async def test_a_document_of_50_mb_ends_its_stream_with_the_limit_named(bank: Client) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(bank.target, options=options) as channel:
        stub = type(bank.stub)(channel)

        async def requests() -> AsyncIterator[pb.IngestDocumentsRequest]:
            yield pb.IngestDocumentsRequest(document=pb.Document(id="bad", text="x" * 50_000_000))

        with pytest.raises(LimitExceededError, match=f"larger than max.*{limits.MAX_REQUEST_BYTES}"):
            async with own_errors():
                async for _ in stub.IngestDocuments(requests()):
                    pass
    await bank.refused(bank.get("bad"), NotFoundError)


async def test_a_request_without_a_document_is_refused(bank: Client) -> None:
    error = await bank.refused(bank.ingest_requests(pb.IngestDocumentsRequest()), InvalidArgumentError)
    assert error.field == "document.text"


async def test_a_stream_without_requests_ends_well(bank: Client) -> None:
    assert await bank.ingest() == []
    assert await bank.upload() == []


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"text": "x", "top_k": 0}, "top_k", r"top_k must be in 1\.\.64, got 0"),
        ({"text": "x", "top_k": -1}, "top_k", "got -1"),
        ({"text": "x", "top_k": 65}, "top_k", "got 65"),
        ({"text": "x", "top_k": 10**9}, "top_k", "got 1000000000"),
        ({"document_ids": ["always"], "top_k": -1}, "top_k", "got -1"),
        ({"text": "x", "top_k": 1, "min_score": NAN}, "min_score", "got nan"),
        ({"text": "x", "top_k": 1, "min_score": INF}, "min_score", "got inf"),
        ({"text": "x", "top_k": 1, "min_score": 1.01}, "min_score", r"-1\.\.1"),
        ({"top_k": 1}, "text", "exactly one of text, vector, document_ids must be given, got none"),
        ({"text": "x", "vector": [1.0], "top_k": 1}, "vector", "got text and vector"),
        ({"text": "x", "document_ids": ["a"], "top_k": 1}, "document_ids", "got text and document_ids"),
        ({"text": " ", "top_k": 1}, "text", "not blank"),
        ({"text": "x" * (limits.MAX_TEXT_BYTES + 1), "top_k": 1}, "text", "1048577"),
        ({"vector": [1.0] * 383, "top_k": 1}, "vector", "384 dimensions, got 383"),
        ({"vector": [0.0] * 384, "top_k": 1}, "vector", "finite and not zero"),
        ({"vector": [NAN] + [1.0] * 383, "top_k": 1}, "vector", "finite"),
        ({"vector": [INF] + [1.0] * 383, "top_k": 1}, "vector", "finite"),
        ({"document_ids": [str(n) for n in range(65)]}, "document_ids", "at most 64, got 65"),
        ({"document_ids": ["always", "always"]}, "document_ids", "distinct"),
        ({"document_ids": ["always", ""]}, "document_ids[1]", "not be empty"),
        ({"text": "x", "top_k": 1, "namespace": "a/b"}, "namespace", "got 'a/b'"),
        ({"text": "x", "top_k": 1, "retrieval": 9}, "retrieval", "one of DENSE, LEXICAL, HYBRID, got 9"),
        ({"vector": [1.0] * 384, "top_k": 1, "retrieval": pb.HYBRID}, "retrieval", "dense without text, got hybrid"),
        ({"document_ids": ["always"], "filter": condition()}, "filter", "absent with document_ids"),
        ({"text": "x", "top_k": 1, "filter": condition(times=17)}, "filter.conditions", "at most 16, got 17"),
        ({"text": "x", "top_k": 1, "filter": condition(operator=0)}, "filter.conditions[0].operator", "EQUALS.*got 0"),
        ({"text": "x", "top_k": 1, "filter": condition(values=[])}, "filter.conditions[0].values", r"1\.\.64.*got 0"),
        ({"text": "x", "top_k": 1, "filter": condition(values=["v"] * 65)}, "filter.conditions[0].values", "got 65"),
        (
            {"text": "x", "top_k": 1, "filter": condition(operator=3)},
            "filter.conditions[0].values",
            "none with PRESENT",
        ),
        ({"text": "x", "top_k": 1, "filter": condition(key="k" * 4097)}, "filter.conditions[0].key", "at most 4096"),
        ({"text": "x", "top_k": 1, "filter": condition(values=["v" * 4097])}, "filter.conditions[0].values", "4096"),
    ],
)
async def test_a_query_out_of_its_limits_is_refused(
    bank: Client, fields: dict[str, Any], field: str, message: str
) -> None:
    error = await bank.refused(bank.query(**fields), InvalidArgumentError)
    assert error.field == field
    with pytest.raises(InvalidArgumentError, match=message):
        raise error


@pytest.mark.parametrize(
    ("digests", "field"),
    [
        ([], "digests"),
        (["0" * 64] * 65, "digests"),
        (["0" * 63], "digests[0]"),
        (["0" * 64, "A" * 64], "digests[1]"),
        (["../../../../etc/passwd"], "digests[0]"),
    ],
)
async def test_a_fetch_out_of_its_limits_is_refused(bank: Client, digests: list[str], field: str) -> None:
    assert (await bank.refused(bank.fetch(digests), InvalidArgumentError)).field == field


async def test_an_unknown_gradient_is_not_found(bank: Client) -> None:
    known = (await bank.get("always")).gradient_digest
    error = await bank.refused(bank.fetch([known, "0" * 64]), NotFoundError)
    assert (error.kind, error.name) == ("gradient", "0" * 64)


@pytest.mark.parametrize(
    ("call", "fields", "field"),
    [
        ("list", {"page_size": 1001}, "page_size"),
        ("list", {"page_size": 2**32 - 1}, "page_size"),
        ("list", {"page_token": "not base64!"}, "page_token"),
        ("list", {"page_token": "gICA"}, "page_token"),
        ("list", {"namespace": "a b"}, "namespace"),
        ("list", {"filter": condition(values=[])}, "filter.conditions[0].values"),
        ("list", {"filter": condition(17)}, "filter.conditions"),
        ("get", {"id": ""}, "id"),
        ("get", {"id": "x" * 257}, "id"),
        ("get", {"id": "x", "namespace": "a b"}, "namespace"),
        ("delete", {"id": ""}, "id"),
        ("delete", {"id": "x", "namespace": "a b"}, "namespace"),
    ],
)
async def test_other_calls_out_of_their_limits_are_refused(
    bank: Client, call: str, fields: dict[str, Any], field: str
) -> None:
    assert (await bank.refused(getattr(bank, call)(**fields), InvalidArgumentError)).field == field


def record_of(learner: str = "a learner", codec: str = DEFAULT_CODEC) -> bytes:
    spec = spec_of(learner)
    return encode_gradient(np.ones(spec.num_values, np.float32), spec, codec)


DOCUMENT = pb.Document(id="up", text="uploaded")
RECORD = record_of()
HEADER = upload_of(DOCUMENT, RECORD)[0]
MAX_BYTES = max_record_bytes(spec_of())
CHUNK = pb.IngestGradientsRequest(chunk=RECORD)


@pytest.mark.parametrize(
    ("parts", "field", "message"),
    [
        ([CHUNK], "header", "first message must be a header"),
        ([pb.IngestGradientsRequest()], "part", "got neither"),
        ([HEADER], "chunk", r"add up to header.record_bytes = \d+, got 0"),
        ([HEADER, pb.IngestGradientsRequest(chunk=RECORD[:-1])], "chunk", "cut off"),
        ([HEADER, CHUNK, pb.IngestGradientsRequest(chunk=b"x")], "chunk", "so far"),
        ([HEADER, pb.IngestGradientsRequest(chunk=b"x" * (2**20 + 1))], "chunk", "at most 1048576 bytes, got 1048577"),
        (upload_of(DOCUMENT, RECORD, record_bytes=0), "header.record_bytes", "got 0"),
        (upload_of(DOCUMENT, RECORD, record_bytes=HEADER_BYTES), "header.record_bytes", "got 128"),
        (upload_of(DOCUMENT, RECORD, record_bytes=2**63), "header.record_bytes", f"129..{MAX_BYTES} "),
        (upload_of(DOCUMENT, b"\0" * 200), "chunk", "malformed.*start with"),
        (upload_of(DOCUMENT, RECORD[:-1] + bytes([RECORD[-1] ^ 1])), "chunk", "malformed.*checksum"),
        (upload_of(DOCUMENT, RECORD, embedding=[1.0]), "header.embedding", "384 dimensions, got 1"),
        (upload_of(DOCUMENT, RECORD, embedding=[NAN] * 384), "header.embedding", "finite"),
        (upload_of(pb.Document(id="up"), RECORD), "document.text", "empty"),
    ],
)
async def test_a_malformed_upload_is_refused(
    bank: Client, parts: list[pb.IngestGradientsRequest], field: str, message: str
) -> None:
    error = await bank.refused(bank.upload(*parts), InvalidArgumentError)
    assert (error.field, error.index) == (field, 0)
    with pytest.raises(InvalidArgumentError, match=message):
        raise error
    await bank.refused(bank.get("up"), NotFoundError)


async def test_a_malformed_upload_after_good_ones_names_its_index(bank: Client) -> None:
    good = [pb.Document(id=f"up {n}", text="uploaded") for n in range(6)]
    parts = [part for document in good for part in upload_of(document, RECORD)]
    error = await bank.refused(bank.upload(*parts, HEADER), InvalidArgumentError)
    assert error.index == 6
    for document in good:
        assert (await bank.delete(document.id)).version >= 1


async def test_a_gradient_of_another_learner_is_refused_with_both_fingerprints(bank: Client) -> None:
    other = record_of("another learner")
    error = await bank.refused(bank.upload(*upload_of(DOCUMENT, other)), LearnerMismatchError)
    assert (error.expected, error.actual) == (spec_of().fingerprint, spec_of("another learner").fingerprint)


async def test_bytes_that_are_no_request_end_their_call_only(bank: Client) -> None:
    raw = bank.channel.unary_unary("/regrad.bank.v1.BankService/Query")
    with pytest.raises(InternalError):
        async with own_errors():
            await raw(b"\xff\xff\xff not protobuf")


async def test_bad_requests_do_not_disturb_good_ones_beside_them(bank: Client) -> None:
    bad = [
        bank.refused(bank.query(text="x", top_k=0), InvalidArgumentError),
        bank.refused(bank.ingest({"id": "bad", "text": "\0"}), InvalidArgumentError),
        bank.refused(bank.upload(CHUNK), InvalidArgumentError),
        bank.refused(bank.fetch(["0" * 64]), NotFoundError),
    ]
    good = [bank.query(text="always", top_k=1) for _ in range(20)]
    results = await asyncio.gather(*bad, *good)
    assert all(response.hits[0].id == "always" for response in results[4:])


async def test_the_test_encoder_gives_every_document_another_gradient(bank: Client) -> None:
    one, two = HashEncoder().encode([("", "one"), ("", "two")])
    assert not np.array_equal(one.values, two.values)
