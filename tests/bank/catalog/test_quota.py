"""The limits of a namespace, in every catalog and in a bank."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import SentenceVectors
from bank_service.errors import QuotaExceededError
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, upload_of
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.values.documents import Document, Gradient
from bank_service.values.embedder import Embedder
from bank_service.values.namespace_limits import NamespaceLimits
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient
from tests.bank.catalog.test_catalog import document, gradient

if TYPE_CHECKING:
    from tests.bank.catalog.conftest import Opener


def put(catalog: Catalog, id: str, text: str, namespace: str = "n", gradient_bytes: int = 100) -> Future[Any]:
    gradient = Gradient(f"{id}{text}", gradient_bytes, 1, False, b"\0\0\0\0" * 4)
    return catalog.put(Document(namespace, id, "", text), gradient, None)


def usage(catalog: Catalog, namespace: str = "n") -> tuple[int, int]:
    with catalog.view() as view:
        used = view.usage(namespace)
    return used.num_documents, used.num_bytes


def test_usage_follows_every_kind_of_change(catalog: Catalog) -> None:
    assert usage(catalog) == (0, 0)
    for id, text in (("a", "one"), ("b", "zwölf"), ("a", "longer than one"), ("c", "three")):
        put(catalog, id, text).result()
    put(catalog, "a", "elsewhere", "m").result()
    catalog.delete("n", "b", None).result()
    put(catalog, "b", "back again", gradient_bytes=7).result()
    put(catalog, "b", "back again", gradient_bytes=7).result()
    catalog.delete("n", "c", None).result()
    catalog.delete("m", "a", None, purge=True).result()
    assert (usage(catalog), usage(catalog, "m")) == ((2, 15 + 100 + 10 + 7), (0, 0))


def test_past_versions_count_towards_a_namespaces_bytes(open_store: Opener) -> None:
    catalog = open_store(limits_of=lambda _: NamespaceLimits(max_bytes=330), history_seconds=3600)
    for digit in "012":
        put(catalog, "a", f"text {digit}").result()
    assert usage(catalog) == (1, 3 * 106)
    with pytest.raises(QuotaExceededError, match="with purge"):
        put(catalog, "a", "text 3").result()
    catalog.delete("n", "a", None).result()
    assert usage(catalog) == (0, 3 * 106)
    assert catalog.expire_history(None, 1).result() == ["atext 0"]
    assert usage(catalog) == (0, 2 * 106)
    catalog.delete("n", "a", None, purge=True).result()
    assert usage(catalog) == (0, 0)


def test_vectors_of_sentences_count_as_long_as_their_version_is_there(open_store: Opener) -> None:
    catalog = open_store(history_seconds=3600)
    for metadata in ({}, {"colour": "red"}):  # a change of metadata copies the vectors
        sentences = None if metadata else SentenceVectors(b"p" * 8, b"v" * 16)
        catalog.put(document("a", "one", metadata=metadata), gradient(), None, sentences).result()
    assert usage(catalog) == (1, 2 * (3 + 100 + 24))
    catalog.put(document("b", "two"), gradient(), None).result()
    for _ in range(2):  # at its first cue; the second query finds them
        catalog.put_sentences(3, SentenceVectors(b"p" * 8, b"v" * 32)).result()
    assert usage(catalog) == (2, 2 * (3 + 100 + 24) + 3 + 100 + 40)
    catalog.expire_history(None, 1).result()
    assert usage(catalog) == (2, (3 + 100 + 24) + 3 + 100 + 40)
    for id in "ab":
        catalog.delete("n", id, None, purge=True).result()
    assert usage(catalog) == (0, 0)


def test_vectors_of_sentences_count_against_the_limit_of_a_put_and_make_room_when_they_go(open_store: Opener) -> None:
    catalog = open_store(limits_of=lambda _: NamespaceLimits(max_bytes=200), history_seconds=0)
    with pytest.raises(QuotaExceededError, match="max_namespace_bytes"):
        catalog.put(document("a", "x" * 10), gradient(), None, SentenceVectors(b"p" * 8, b"v" * 83)).result()
    stored = catalog.put(document("a", "x" * 10), gradient(), None).result().stored
    assert catalog.put_sentences(stored.sequence, SentenceVectors(b"p" * 8, b"v" * 800)).result(), "a query's, always"
    longer = document("a", "x" * 90)
    with catalog.view() as view:
        catalog.check_room(view, longer, stored)
    catalog.put(longer, gradient(), None).result()
    assert usage(catalog) == (1, 90 + 100)


def test_a_namespace_takes_no_more_documents_than_it_may_have(open_store: Opener) -> None:
    catalog = open_store(limits_of=lambda _: NamespaceLimits(max_documents=2))
    for id in "ab":
        put(catalog, id, "x").result()
    with pytest.raises(QuotaExceededError, match="'n' must have at most 2 documents"):
        put(catalog, "c", "x").result()
    put(catalog, "a", "changed").result()  # no more documents than before
    put(catalog, "c", "x", "m").result()  # each namespace for itself
    catalog.delete("n", "b", None).result()
    put(catalog, "c", "x").result()


def test_writers_at_once_do_not_share_the_last_place(open_store: Opener) -> None:
    catalog = open_store(limits_of=lambda _: NamespaceLimits(max_documents=5))
    puts = [put(catalog, str(number), "x") for number in range(40)]  # many of them in one transaction
    outcomes = [future.exception() for future in puts]
    assert sum(error is None for error in outcomes) == 5
    assert all(isinstance(error, QuotaExceededError) for error in outcomes if error is not None)
    assert usage(catalog) == (5, 5 * 101)
    put(catalog, "0", "an update goes through").result()
    catalog.delete("n", "0", None).result()
    put(catalog, "new", "in its place").result()


def test_bytes_are_those_of_texts_and_gradients_and_a_smaller_one_always_fits(open_store: Opener) -> None:
    most = [210]
    catalog = open_store(limits_of=lambda _: NamespaceLimits(max_bytes=most[0]))
    put(catalog, "a", "12345").result()
    put(catalog, "b", "12345").result()
    for id, text in (("c", "1"), ("a", "123456")):
        with pytest.raises(QuotaExceededError, match="max_namespace_bytes"):
            put(catalog, id, text).result()
    most[0] = 50  # lowered below what is there
    put(catalog, "a", "1234").result()
    put(catalog, "c", "x", "elsewhere", gradient_bytes=1).result()  # each namespace for itself


@pytest.mark.asyncio
async def test_a_refused_document_names_the_limit_and_leaves_nothing_behind(
    data_dir: Path, tmp_path: Path, embedder: Embedder
) -> None:
    tokens = Tokens(tmp_path)
    everybody = tokens.add("everybody", "read write", "*")
    tokens.write(tokens.path.read_text() + 'limits."small" = { max_documents = 1 }\n')
    config = BankConfig(data_dir=data_dir, tokens_file=tokens.path, max_namespace_documents=2)
    encoder = HashEncoder()
    record = encode_gradient(encoder.encode([("", "c")])[0].values, encoder.spec, DEFAULT_CODEC)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target, everybody) as client:
        for namespace, most in (("small", 1), ("other", 2)):
            documents = [{"namespace": namespace, "id": id, "text": f"{id} {namespace}"} for id in "abc"[: most + 1]]
            error = await client.refused(client.ingest(*documents), QuotaExceededError)
            assert (error.limit, error.namespace) == ("max_namespace_documents", namespace)
            assert error.index in range(most + 1), "they are stored side by side: whichever came last"
            assert f"at most {most} documents" in error.message
        over = pb.Document(namespace="other", id="z", text="c")
        await client.refused(client.upload(*upload_of(over, record)), QuotaExceededError)
        assert (await client.stats()).num_documents == 3
    # The bank has closed, so that what it does after an answer is done.
    assert len([*(data_dir / "blobs").glob("??/*")]) == 3


@pytest.mark.asyncio
async def test_requests_in_flight_are_bounded_for_each_namespace(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, max_namespace_requests=1)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        stream = client.stub.IngestDocuments()  # one request, however many documents
        for id in "ab":
            await stream.write(pb.IngestDocumentsRequest(document=pb.Document(namespace="n", id=id, text="x")))
            await stream.read()
        error = await client.refused(client.get("a", "n"), QuotaExceededError)
        assert (error.limit, error.namespace) == ("max_namespace_requests", "n") and error.retry_after_ms > 0
        await client.put("a", "others have places of their own", namespace="m")
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        await asyncio.wait_for(client.get("a", "n"), 10)


@pytest.mark.asyncio
async def test_a_fetch_counts_in_the_namespaces_whose_gradients_it_asks_for(
    data_dir: Path, tmp_path: Path, embedder: Embedder
) -> None:
    tokens = Tokens(tmp_path)
    everybody, reader = tokens.add("everybody", "read write", "*"), tokens.add("reader", "read", "m")
    config = BankConfig(data_dir=data_dir, tokens_file=tokens.path, max_namespace_requests=1)
    async with (
        BankServer(config, HashEncoder(), embedder) as server,
        Client(server.address.target, everybody) as client,
        Client(server.address.target, reader) as of_m,
    ):
        both = [(await client.put("same", "in two", namespace=name)).gradient_digest for name in ("n", "m")][0]
        alone = (await client.put("own", "in one", namespace="m")).gradient_digest
        stream = client.stub.IngestDocuments()
        await stream.write(pb.IngestDocumentsRequest(document=pb.Document(namespace="n", id="a", text="x")))
        taken = (await stream.read()).gradient_digest
        for digests in ([taken], [alone, both]):
            error = await client.refused(client.fetch(digests), QuotaExceededError)
            assert (error.limit, error.namespace) == ("max_namespace_requests", "n") and error.retry_after_ms > 0
        assert [digest for digest, _ in await client.fetch([alone])] == [alone]
        # Where the caller may not read, its call does not count either: it could tell that the gradient is there.
        assert [digest for digest, _ in await of_m.fetch([both])] == [both]
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        for _ in range(2):  # and it gives its places back
            assert len(await client.fetch([taken, both, alone])) == 3


@pytest.mark.asyncio
async def test_a_document_that_has_no_room_is_refused_before_it_is_encoded(data_dir: Path, embedder: Embedder) -> None:
    encoder = HashEncoder()
    config = BankConfig(data_dir=data_dir, max_namespace_documents=2, max_namespace_bytes=20_000)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        for id in "ab":
            await client.put(id, f"text {id}")
        num_batches = len(encoder.batches)
        error = await client.refused(client.put("c", "one too many"), QuotaExceededError)
        assert (error.limit, error.index) == ("max_namespace_documents", 0)
        error = await client.refused(client.put("a", "much " * 4_000), QuotaExceededError)
        assert error.limit == "max_namespace_bytes"
        assert len(encoder.batches) == num_batches
        assert (await client.put("a", "another text")).version == 2, "an update takes no more room"
        await client.delete("b")
        assert (await client.put("c", "in its place")).version == 1
        assert len(encoder.batches) == num_batches + 2
