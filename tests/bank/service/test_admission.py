from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.errors import DeadlineExceededError, OverloadedError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, FloatArray, encode_gradient


class GatedEncoder(HashEncoder):
    """Holds each batch until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def encode(self, documents: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        self.entered.set()
        assert self.gate.wait(10)
        return super().encode(documents)

    def encode_now(self, text: str) -> FloatArray:
        return super().encode([("", text)])[0].values

    @property
    def texts(self) -> set[str]:
        return {text for batch in self.batches for text in batch}


@pytest.mark.asyncio
async def test_a_flood_of_documents_does_not_hold_up_a_query(data_dir: Path, embedder: Embedder) -> None:
    """By order of events: the queries are answered while every ingest still stands before the closed gate."""
    encoder = GatedEncoder()
    encoder.gate.set()
    config = BankConfig(data_dir=data_dir, max_pending_documents=8, max_ingests=4)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        await client.put("first", "a text to be found")
        encoder.gate.clear()
        encoder.entered.clear()

        async def flood(number: int) -> int:
            documents = ({"id": f"{number}-{n}", "text": f"flood {number} {n}"} for n in range(50))
            return len(await client.ingest(*documents))

        floods = [asyncio.create_task(flood(number)) for number in range(4)]
        await asyncio.to_thread(encoder.entered.wait, 30)
        answers = await asyncio.gather(*(client.query(text="a text to be found", top_k=1) for _ in range(20)))
        assert all(answer.hits[0].id == "first" for answer in answers)
        assert (await client.get("first")).version == 1
        assert not any(task.done() for task in floods)
        error = await client.refused(client.put("over", "x"), OverloadedError)
        assert error.limit == "max_ingests" and error.retry_after_ms > 0
        encoder.gate.set()
        assert await asyncio.gather(*floods) == [50] * 4
        assert await flood(5) == 50, "a place that was left is free again"


@pytest.mark.asyncio
async def test_documents_of_callers_that_went_away_or_ran_out_of_time_are_not_encoded(
    data_dir: Path, embedder: Embedder
) -> None:
    encoder = GatedEncoder()
    config = BankConfig(data_dir=data_dir, encode_batch_size=1)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        first = asyncio.create_task(client.put("first", "in the encoder"))
        await asyncio.to_thread(encoder.entered.wait, 30)

        def stream(text: str, timeout: float | None) -> grpc.aio.StreamStreamCall:
            request = pb.IngestDocumentsRequest(document=pb.Document(id=text, text=text))
            return client.stub.IngestDocuments(iter([request]), timeout=timeout)

        # On one connection, in order: when the second one's time is up, the bank knows of the first.
        gone, late = stream("gone away", None), stream("too late", 0.5)
        with pytest.raises(DeadlineExceededError):
            async with own_errors():
                await late.read()
        gone.cancel()
        calls = server.metrics.registry.get_sample_value
        labels = {"method": "IngestDocuments", "code": "CANCELLED"}
        while calls("regrad_bank_calls_total", labels) != 2:  # the bank has heard of both
            await asyncio.sleep(0.01)
        encoder.gate.set()
        await first
        await client.put("last", "behind them")
        assert encoder.texts == {"in the encoder", "behind them"}


@pytest.mark.asyncio
async def test_queries_beyond_what_the_bank_takes_on_are_told_when_to_come_back(
    data_dir: Path, embedder: Embedder
) -> None:
    class GatedEmbedder:
        name, dimension = embedder.name, embedder.dimension
        gate = threading.Event()

        def embed(self, text: str) -> object:
            assert self.gate.wait(60)
            return embedder.embed(text)

        def reads_all(self, text: str) -> bool:
            return True

    gated = GatedEmbedder()
    config = BankConfig(data_dir=data_dir, max_queries=2, max_calls=4)
    async with (
        BankServer(config, HashEncoder(), gated) as server,  # type: ignore[arg-type]
        Client(server.address.target) as client,
    ):
        outcomes = [asyncio.create_task(client.query(text="x", top_k=1)) for _ in range(5)]
        refused, _ = await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        while len(refused) < 3:
            refused, _ = await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED, timeout=0.01)
        errors = [task.exception() for task in refused]
        assert all(isinstance(error, OverloadedError) and error.limit == "max_queries" for error in errors)
        await client.stats()  # another kind of call has room
        gated.gate.set()
        assert len([task for task in outcomes if task not in refused and not (await task).hits]) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["IngestDocuments", "IngestGradients"])
async def test_a_stream_that_nobody_uses_loses_its_place_and_keeps_what_was_acknowledged(
    data_dir: Path, embedder: Embedder, method: str
) -> None:
    config = BankConfig(data_dir=data_dir, max_ingests=1, ingest_idle_seconds=0.5)
    encoder = HashEncoder()
    document = pb.Document(id="before", text="the silence")
    record = encode_gradient(encoder.encode([("", document.text)])[0].values, encoder.spec, DEFAULT_CODEC)
    if method == "IngestDocuments":
        sent = [pb.IngestDocumentsRequest(document=document)]
    else:  # the second header says that the first record is whole
        sent = [*upload_of(document, record), *upload_of(pb.Document(id="half", text="x"), record)[:2]]
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        for silent_from_the_start in (True, False):
            stream = getattr(client.stub, method)()
            if not silent_from_the_start:
                for part in sent:
                    await stream.write(part)
                assert (await stream.read()).id == "before"
                await client.refused(client.put("over", "x"), OverloadedError)
            with pytest.raises(DeadlineExceededError, match=r"within 0.5 s \(ingest_idle_seconds\)") as caught:
                async with own_errors():
                    await stream.read()
            assert caught.value.index == (0 if silent_from_the_start else 1)
            assert (await client.put("next", "the place is free again")).id == "next"
        assert {entry.id for entry in (await client.list()).documents} == {"before", "next"}


@pytest.mark.asyncio
async def test_a_client_that_waits_for_its_answer_or_sends_slowly_is_not_idle(
    data_dir: Path, embedder: Embedder
) -> None:
    encoder = GatedEncoder()
    config = BankConfig(data_dir=data_dir, ingest_idle_seconds=0.5)
    record = encode_gradient(encoder.encode_now("slow"), encoder.spec, DEFAULT_CODEC)
    async with BankServer(config, encoder, embedder) as server, Client(server.address.target) as client:
        stream = client.stub.IngestDocuments()
        await stream.write(pb.IngestDocumentsRequest(document=pb.Document(id="patient", text="long in the encoder")))
        await asyncio.sleep(1.2)
        encoder.gate.set()
        assert (await stream.read()).id == "patient"
        await stream.done_writing()
        parts = upload_of(pb.Document(id="slow", text="slow"), record, chunk_bytes=len(record) // 6)
        upload = client.stub.IngestGradients()
        for part in parts:
            await upload.write(part)
            await asyncio.sleep(0.2)
        await upload.done_writing()
        assert (await upload.read()).id == "slow"
