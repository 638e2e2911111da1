"""Gradients that are lost or damaged on disk: made again where the truth allows it, never served wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from bank_service.service.offline import opened, scrub
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, upload_of
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder, spec_of
from bank_service.upkeep import repair
from bank_service.upkeep.scrub import Scrubber
from bank_service.values.config import BankConfig
from bank_service.values.documents import Document
from bank_service.values.embedder import Embedder
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.errors import DataLossError, NotFoundError, UnavailableError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient, record_digest
from tests.bank import inside
from tests.bank.records.test_fetch import _flush, blob, ingested

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
}


def repaired(server: BankServer) -> float | None:
    return server.metrics.registry.get_sample_value("regrad_bank_repaired_gradients_total")


@pytest.mark.asyncio
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_gradient_is_made_again_from_its_text_while_it_is_fetched(
    server: BankServer, client: Client, data_dir: Path, damage: str
) -> None:
    digests = await ingested(client, 3)
    sound = {digest: blob(data_dir, digest).read_bytes() for digest in digests}
    await _flush(server)
    for digest in digests[:2]:
        DAMAGES[damage](blob(data_dir, digest))
    assert dict(await client.fetch(digests)) == sound
    assert repaired(server) == 2
    await _flush(server)
    assert [blob(data_dir, digest).read_bytes() for digest in digests] == [sound[digest] for digest in digests]
    assert (await client.get("d0")).version == 1
    DAMAGES[damage](blob(data_dir, digests[2]))
    (hit,) = (await client.query(document_ids=["d2"], include_gradients=True)).hits
    assert hit.gradient == sound[digests[2]]


@pytest.mark.asyncio
async def test_a_damaged_gradient_that_was_uploaded_is_a_loss_until_it_is_uploaded_again(
    server: BankServer, client: Client, data_dir: Path
) -> None:
    record = encode_gradient(HashEncoder().encode([("", "another text")])[0].values, spec_of(), DEFAULT_CODEC)
    document = pb.Document(id="a", text="a text")
    parts = upload_of(document, record)
    (put,) = await client.upload(*parts)
    await _flush(server)
    blob(data_dir, put.gradient_digest).write_bytes(b"x" * len(record))
    error = await client.refused(client.fetch([put.gradient_digest]), DataLossError)
    assert error.digest == put.gradient_digest and "ingest its document again" in error.message
    query = client.query(document_ids=["a"], include_gradients=True)
    assert (await client.refused(query, DataLossError)).digest == put.gradient_digest
    assert (await client.get("a")).gradient_digest == put.gradient_digest, "nobody put another gradient in its place"
    assert repaired(server) == 0
    await client.upload(*parts)
    assert await client.fetch([put.gradient_digest]) == [(put.gradient_digest, record)]


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["deleted", "purged", "expired"])
async def test_a_gradient_that_nobody_names_any_more_is_neither_repaired_nor_lost(
    data_dir: Path, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went between the scrub's look at the catalog and its look at the disk."""
    data_dir.mkdir()
    config = BankConfig(data_dir=data_dir, history_seconds=0 if way == "deleted" else 3600)
    async with opened(config, HashEncoder(), HashEmbedder()) as bank:
        digest = (await bank.put(Document("", "a", "", "a text"))).stored.gradient.digest
        kept = (await bank.put(Document("", "b", "", "another text"))).stored.gradient.digest
        if way == "expired":
            await bank.put(Document("", "a", "", "what it is now"))
        page = Scrubber._page

        def look(scrubber: Scrubber, after: str) -> dict[str, int]:
            digests = page(scrubber, after)
            if not after:
                assert digest in digests
                run = asyncio.run_coroutine_threadsafe
                if way == "expired":
                    gone = scrubber._stores.catalog.expire_history(None, 10).result()
                    run(inside.discarder(bank).discard(gone or ()), loop).result()
                else:
                    run(bank.delete("", "a", purge=way == "purged"), loop).result()
                    run(inside.background(bank).drain(), loop).result()
                assert not blob(data_dir, digest).exists()
                blob(data_dir, kept).unlink()
            return digests

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(Scrubber, "_page", look)
        counts = await bank.scrub()
        assert (counts.num_repaired, counts.num_lost) == (1, 0), "the other's, whose document is there"
        assert f"gradient {kept} was damaged" in caplog.text and digest not in caplog.text


class ForgetfulEncoder(HashEncoder):
    """Gives each text another gradient each time."""

    def encode(self, documents: list[tuple[str, str]]) -> list[EncodedDocument]:  # type: ignore[override]
        return super().encode([(f"{len(self.batches)}", text) for _, text in documents])


@pytest.mark.asyncio
async def test_where_the_encoder_gives_another_gradient_the_document_gets_it_as_a_new_version(
    data_dir: Path, embedder: Embedder
) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, ForgetfulEncoder(), embedder) as server, Client(server.address.target) as client:
        put = await client.put("a", "a text")
        await _flush(server)
        blob(data_dir, put.gradient_digest).unlink()
        await client.refused(client.fetch([put.gradient_digest]), NotFoundError)
        got = await client.get("a")
        assert got.version == 2 and got.gradient_digest != put.gradient_digest
        ((digest, record),) = await client.fetch([got.gradient_digest])
        assert record_digest(record) == digest
        assert (await client.query(text="a text", top_k=1)).hits[0].gradient_digest == digest


class Slow(HashEncoder):
    """Takes its time when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        assert self.go.wait(20)
        return super().encode(documents)


@pytest.mark.asyncio
async def test_a_reader_waits_a_while_for_a_repair_which_goes_on_without_it(
    data_dir: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "WAIT_SECONDS", 0.2)
    encoder, config = Slow(), BankConfig(data_dir=data_dir)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        put = await client.put("a", "a text")
        await _flush(server)
        blob(data_dir, put.gradient_digest).unlink()
        encoder.go.clear()
        error = await client.refused(client.fetch([put.gradient_digest]), UnavailableError)
        assert "being made again" in error.message
        encoder.go.set()
        while repaired(server) != 1:  # the test's own limit ends it
            await client.stats()
        assert len(await client.fetch([put.gradient_digest])) == 1


@pytest.mark.asyncio
async def test_a_scrub_finds_and_mends_what_nobody_asked_for(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        digests = await ingested(client, 100)
        record = encode_gradient(HashEncoder().encode([("", "x")])[0].values, spec_of(), DEFAULT_CODEC)
        (uploaded,) = await client.upload(*upload_of(pb.Document(id="mine", text="mine"), record))
    for digest in (digests[0], digests[99], uploaded.gradient_digest):
        blob(data_dir, digest).write_bytes(b"rot")
    counts = await scrub(config, HashEncoder(), embedder)
    assert (counts.num_gradients, counts.num_repaired, counts.num_lost) == (101, 2, 1)
    counts = await scrub(config, HashEncoder(), embedder)
    assert (counts.num_repaired, counts.num_lost) == (0, 1)
    assert record_digest(blob(data_dir, digests[99]).read_bytes()) == digests[99]
    with pytest.raises(FileNotFoundError, match="must be the folder of a bank"):
        await scrub(BankConfig(data_dir=data_dir / "nowhere"), HashEncoder(), embedder)


@pytest.mark.asyncio
async def test_a_scrub_in_the_background_goes_at_its_rate(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        digests = await ingested(client, 4)
    sound = blob(data_dir, digests[0]).read_bytes()
    blob(data_dir, digests[0]).write_bytes(b"rot")
    config = BankConfig(data_dir=data_dir, scrub_mib_per_second=1)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        while repaired(server) != 1:  # the test's own limit ends it
            await client.stats()
    assert blob(data_dir, digests[0]).read_bytes() == sound
