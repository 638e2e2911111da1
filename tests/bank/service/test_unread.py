"""Clients that don't read, or have gone: their calls end, and are counted as what they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace

from bank_service.backup.snapshot import Progress
from bank_service.bank import Bank
from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.upkeep.recode import RecodeProgress
from bank_service.values.config import BankConfig
from bank_service.wire.errors import BankError, OverloadedError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.generated import bank_pb2_grpc
from bank_service.wire.record import GradientSpec
from tests.spans import recorded_spans

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0)]  # 64 KiB unread, where it would grow to some MiB


class LargeEncoder(HashEncoder):
    """Gradients of a megabyte, more than lies in buffers on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = GradientSpec(self.spec.fingerprint, self.spec.layout_id, ((1, 1_000_000),))  # one component


@asynccontextmanager
async def running(data_dir: Path, **settings: Any) -> AsyncIterator[tuple[BankServer, Client, Any]]:
    """A bank, a client, and the stub of another one."""
    config = BankConfig(data_dir=data_dir, **settings)
    async with (
        BankServer(config, LargeEncoder(), HashEmbedder()) as server,
        Client(server.address.target) as client,
        grpc.aio.insecure_channel(server.address.target, options=SMALL_WINDOW) as channel,
    ):
        yield server, client, bank_pb2_grpc.BankServiceStub(channel)


def codes(server: BankServer, method: str) -> dict[str, int]:
    """How many calls of the method ended with each code."""
    families = server.metrics.registry.collect()
    calls = next(family.samples for family in families if family.name == "regrad_bank_calls")
    mine = [item for item in calls if item.name.endswith("_total") and item.labels["method"] == method]
    return {item.labels["code"]: int(item.value) for item in mine}


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_a_fetch_that_nobody_reads_loses_its_place_and_one_that_is_read_slowly_does_not(data_dir: Path) -> None:
    async with running(data_dir, max_calls=1, unread_seconds=0.6) as (server, client, stub):
        digest = (await client.put("a", "text")).gradient_digest
        request = pb.FetchGradientsRequest(digests=[digest] * 6)
        unread = stub.FetchGradients(request)
        await unread.read()
        await client.refused(client.stats(), OverloadedError)
        await eventually(lambda: codes(server, "FetchGradients") == {"DEADLINE_EXCEEDED": 1})
        await client.stats()
        await asyncio.sleep(1.5)  # the status waits behind what is not read; then the stream is reset
        with pytest.raises(BankError):
            async with own_errors():
                while await unread.read() is not grpc.aio.EOF:
                    pass
        slow = stub.FetchGradients(request)
        parts = []
        while (part := await slow.read()) is not grpc.aio.EOF:
            parts.append(part)
            await asyncio.sleep(0.2)
        assert sum(len(part.chunk) for part in parts) == sum(part.record_bytes for part in parts if not part.offset)
        assert codes(server, "FetchGradients") == {"DEADLINE_EXCEEDED": 1, "OK": 1}


@pytest.mark.asyncio
async def test_an_ingest_whose_acknowledgements_nobody_reads_ends_as_an_idle_one_does(data_dir: Path) -> None:
    async with running(data_dir, max_ingests=1, ingest_idle_seconds=0.6) as (server, client, stub):
        document = pb.Document(id="i" * 250, text="the same")
        stream = stub.IngestDocuments()

        async def write() -> None:
            while True:
                await stream.write(pb.IngestDocumentsRequest(document=document))

        writing = asyncio.create_task(write())
        await eventually(lambda: codes(server, "IngestDocuments") == {"DEADLINE_EXCEEDED": 1})
        writing.cancel()
        stream.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert (await client.put("next", "the place is free again")).id == "next"


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["CreateSnapshot", "RecodeCollection"])
async def test_progress_that_nobody_reads_ends_its_call(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    ended = []

    async def progress(bank: Bank, what: str) -> AsyncIterator[Progress | RecodeProgress]:
        """More of it than any bank of a test has."""
        try:
            for number in count():
                yield Progress(2**40, 0, 0, 0) if method == "CreateSnapshot" else RecodeProgress("int8", 2**40, number)
        finally:
            ended.append(method)

    monkeypatch.setattr(Bank, "snapshot" if method == "CreateSnapshot" else "recode", progress)
    async with running(data_dir, max_calls=1, unread_seconds=0.5) as (server, client, stub):
        request = pb.CreateSnapshotRequest() if method == "CreateSnapshot" else pb.RecodeCollectionRequest()
        call = getattr(stub, method)(request)
        await call.read()
        await eventually(lambda: codes(server, method) == {"DEADLINE_EXCEEDED": 1})
        assert ended == [method]
        await client.stats()
        call.cancel()


@pytest.mark.asyncio
async def test_clients_that_go_in_the_middle_are_counted_as_cancelled_and_leave_no_stack_trace(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    exporter = recorded_spans(monkeypatch)
    async with running(data_dir) as (server, client, _):
        digest = (await client.put("a", "text")).gradient_digest
        for hangs_up in (True, False):
            async with grpc.aio.insecure_channel(server.address.target, options=SMALL_WINDOW) as channel:
                stub = bank_pb2_grpc.BankServiceStub(channel)
                fetches = [stub.FetchGradients(pb.FetchGradientsRequest(digests=[digest] * 8)) for _ in range(10)]
                await asyncio.gather(*(fetch.read() for fetch in fetches))
                ingest = stub.IngestDocuments()
                await ingest.write(pb.IngestDocumentsRequest(document=pb.Document(id="b", text="another")))
                await ingest.read()
                await asyncio.sleep(0.5)  # the bank's writes stand
                for call in (*fetches, ingest) if hangs_up else ():
                    call.cancel()
        await eventually(lambda: codes(server, "FetchGradients").get("CANCELLED", 0) == 20)
        await eventually(lambda: codes(server, "IngestDocuments").get("CANCELLED", 0) == 2)
        assert codes(server, "FetchGradients") == {"CANCELLED": 20}
        assert codes(server, "IngestDocuments") == {"OK": 1, "CANCELLED": 2}
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    spans = [span for span in exporter.get_finished_spans() if span.name == "bank.FetchGradients"]
    assert [span.status.status_code for span in spans] == [trace.StatusCode.ERROR] * 20
    assert {span.status.description for span in spans} == {"CANCELLED"}
