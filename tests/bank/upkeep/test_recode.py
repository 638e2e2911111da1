"""A collection from one codec to another, in a real bank, while documents come and go."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bank_service.blobs.blob_store import BlobStore
from bank_service.errors import CollectionMismatchError, InvalidArgumentError, UnavailableError
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.testing.hash_encoder import HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, decode_gradient, encode_gradient, read_header, record_digest
from tests.bank.wire.old_records import old_record

NUM_DOCUMENTS = 150
FULL = "factors-4-4-8"  # all components of the made-up encoder's tensors


def stream(client: Client, codec: str) -> Any:
    return client.stub.RecodeCollection(pb.RecodeCollectionRequest(codec=codec))


async def recoded(client: Client, codec: str) -> Any:
    """The last message."""
    async with own_errors():
        return [progress async for progress in stream(client, codec)][-1]


async def codecs(client: Client) -> dict[str, str]:
    """Document → its record's codec; every record is what its text gives, as far as its codec keeps it."""
    listed = (await client.list(page_size=1000)).documents
    found, encoder = {}, HashEncoder()
    for start in range(0, len(listed), 50):
        part = listed[start : start + 50]
        records = dict(await client.fetch([entry.gradient_digest for entry in part]))
        for entry in part:
            record = records[entry.gradient_digest]
            found[entry.id] = read_header(record).codec
            text = (await client.get(entry.id)).document.text
            exact = encoder.encode([("", text)])[0].values
            error = np.linalg.norm(decode_gradient(record, spec_of()) - exact) / np.linalg.norm(exact)
            assert error < 0.5, "of a component less, and of this text"
    return found


@pytest.mark.asyncio
async def test_every_gradient_gets_the_new_codec_while_the_bank_serves(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, codec=FULL)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        before = (await client.stats()).gradient_bytes
        running = asyncio.create_task(recoded(client, "factors-3-3-8"))
        for n in range(40):  # meanwhile: an update, a deletion, something new, a question
            await client.put(f"d{n}", f"another text {n}")
            await client.delete(f"d{NUM_DOCUMENTS - 1 - n}")
            await client.put(f"new {n}", f"a new text {n}")
            assert (await client.query(text=f"text {n}", top_k=1, include_gradients=True)).hits[0].gradient
        last = await running
        assert last.finished and not last.num_failed and last.num_recoded <= last.num_done
        found = await codecs(client)
        assert len(found) == NUM_DOCUMENTS and set(found.values()) == {"factors-3-3-8"}
        stats = await client.stats()
        assert stats.codec == "factors-3-3-8" and stats.gradient_bytes < 0.9 * before
        assert stats.num_gradients == len(found), "the old records are gone"
        assert (await client.get("d100")).version == 2
        late = encode_gradient(HashEncoder().encode([("", "x")])[0].values, spec_of(), FULL)
        (uploaded,) = await client.upload(*upload_of(pb.Document(id="x", text="x"), late))
        assert 0 < uploaded.relative_error < 0.5 and (await codecs(client))["x"] == "factors-3-3-8"
        await client.delete("x")
        again = await recoded(client, "factors-3-3-8")
        assert (again.num_done, again.num_recoded) == (NUM_DOCUMENTS, 0)


@pytest.mark.asyncio
async def test_a_bank_that_was_stopped_on_the_way_goes_on(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, codec=FULL)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        async for progress in stream(client, "factors-4-4-4"):
            assert not progress.finished
            break
    async with (
        BankServer(BankConfig(data_dir=data_dir), HashEncoder(), embedder) as server,
        Client(server.address.target) as client,
    ):
        last = await recoded(client, "factors-4-4-4")  # joins what is under way
        assert last.finished and 0 < last.num_recoded <= NUM_DOCUMENTS
        assert set((await codecs(client)).values()) == {"factors-4-4-4"}


@pytest.mark.asyncio
async def test_a_change_of_metadata_meanwhile_keeps_no_old_record(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, codec=FULL)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        running = asyncio.create_task(recoded(client, "factors-3-3-8"))
        for n in range(NUM_DOCUMENTS):
            await client.put(f"d{n}", f"text {n}", metadata={"n": str(n)})
        assert not (await running).num_failed
        assert set((await codecs(client)).values()) == {"factors-3-3-8"}


@pytest.mark.asyncio
async def test_of_two_that_begin_at_once_one_is_refused_or_both_are_one(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, codec=FULL)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        found = await asyncio.gather(
            recoded(client, "factors-4-4-4"), recoded(client, "factors-3-3-8"), return_exceptions=True
        )
        assert sum(isinstance(one, UnavailableError) for one in found) == 1
        assert set((await codecs(client)).values()) == {(await client.stats()).codec}


class Waiting(HashEncoder):
    """Encodes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        self.begun.set()
        self.go.wait(20)
        return super().encode(documents)


@pytest.mark.asyncio
async def test_what_was_being_encoded_when_the_codec_changed_has_the_new_one(
    data_dir: Path, embedder: Embedder
) -> None:
    encoder = Waiting()
    config = BankConfig(data_dir=data_dir, codec=FULL)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        putting = asyncio.create_task(client.put("slow", "a text"))
        await asyncio.to_thread(encoder.begun.wait, 20)
        assert (await recoded(client, "factors-3-3-8")).finished
        encoder.go.set()
        await putting
        assert await codecs(client) == {"slow": "factors-3-3-8"}


@pytest.mark.asyncio
async def test_an_unknown_codec_and_a_second_one_meanwhile_are_refused(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, codec=FULL)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.refused(recoded(client, "zip"), InvalidArgumentError)
        assert (await client.stats()).codec == FULL
        await client.ingest(*({"id": f"d{n}", "text": f"text {n}"} for n in range(NUM_DOCUMENTS)))
        async for progress in stream(client, "factors-4-4-4"):
            assert not progress.finished
            await client.refused(recoded(client, "factors-3-3-8"), UnavailableError)
            break
        assert (await recoded(client, "factors-4-4-4")).finished


async def codec_warnings(data_dir: Path, embedder: Embedder, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the bank says about its codec at its start."""
    caplog.clear()
    async with BankServer(BankConfig(data_dir=data_dir), HashEncoder(), embedder):
        return [record.getMessage() for record in caplog.records if "codec" in record.getMessage()]


@pytest.mark.asyncio
@pytest.mark.parametrize("codec", ["int8", "bf16", "int4"])
async def test_a_collection_with_a_retired_codec_is_read_until_it_is_recoded(
    data_dir: Path, embedder: Embedder, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    values = HashEncoder().encode([("", "an old text")])[0].values
    old = old_record(values, spec_of(), codec)
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.put("old", "an old text")
    BlobStore.in_folder(data_dir / "blobs").put(record_digest(old), old)
    with closing(sqlite3.connect(data_dir / "catalog.sqlite")) as catalog, catalog:  # as an older version left it
        catalog.execute("UPDATE collection SET codec = ?", (codec,))
        catalog.execute("UPDATE versions SET gradient_digest = ?, gradient_bytes = ?", (record_digest(old), len(old)))
    with pytest.raises(CollectionMismatchError, match=f"codec .*must be {codec}, got {DEFAULT_CODEC}.*regrad recode"):
        await BankServer(BankConfig(data_dir=data_dir, codec=DEFAULT_CODEC), HashEncoder(), embedder).start()
    (warning,) = await codec_warnings(data_dir, embedder, caplog)
    assert f"got {codec}, which is retired" in warning and f"`regrad recode {DEFAULT_CODEC}`" in warning
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        ((_, record),) = await client.fetch([(await client.get("old")).gradient_digest])
        assert record == old
        await client.put("new", "a new text")
        assert await all_codecs(client) == {"old": codec, "new": DEFAULT_CODEC}
        assert (await client.stats()).codec == DEFAULT_CODEC
        last = await recoded(client, DEFAULT_CODEC)
        assert (last.num_done, last.num_recoded) == (2, 1)
        assert set((await all_codecs(client)).values()) == {DEFAULT_CODEC}
        ((_, record),) = await client.fetch([(await client.get("old")).gradient_digest])
        assert record == encode_gradient(decode_gradient(old, spec_of()), spec_of(), DEFAULT_CODEC)
    assert await codec_warnings(data_dir, embedder, caplog) == []


async def all_codecs(client: Client) -> dict[str, str]:
    listed = (await client.list()).documents
    records = dict(await client.fetch([entry.gradient_digest for entry in listed]))
    return {entry.id: read_header(records[entry.gradient_digest]).codec for entry in listed}
