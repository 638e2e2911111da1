from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bank_service.errors import BankInUseError, CollectionMismatchError
from bank_service.runtime.data_dir import BankAddress, read_address
from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import HashEncoder, spec_of
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.values.encoder import EncodedDocument
from bank_service.wire.errors import UnavailableError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import read_header

SERVICE = "regrad.bank.v1.BankService"


@pytest.mark.asyncio
async def test_a_ready_bank_says_so_by_health_and_by_its_address_file(server: BankServer, data_dir: Path) -> None:
    assert read_address(data_dir) == server.address
    assert json.loads((data_dir / "address.json").read_text())["pid"] == os.getpid()
    async with grpc.aio.insecure_channel(server.address.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.asyncio
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_a_bank_that_other_machines_reach_warns_that_it_asks_nobody_who_they_are(
    data_dir: Path, embedder: Embedder, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    async with BankServer(BankConfig(data_dir=data_dir, host=host), HashEncoder(), embedder):
        pass
    assert ("no authentication or TLS" in caplog.text) == (host == "0.0.0.0")


@pytest.mark.asyncio
async def test_reflection_names_the_service(server: BankServer) -> None:
    async with grpc.aio.insecure_channel(server.address.target) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
    assert {SERVICE, "grpc.health.v1.Health"} <= names


@pytest.mark.asyncio
async def test_two_banks_cannot_share_a_data_directory(server: BankServer, data_dir: Path, embedder: Embedder) -> None:
    with pytest.raises(BankInUseError, match=f"{data_dir}.*pid {os.getpid()}"):
        await BankServer(BankConfig(data_dir=data_dir), HashEncoder(), embedder).start()
    assert read_address(data_dir) == server.address, "the loser must not take the winner's address away"
    async with Client(server.address.target) as client:
        await client.put("a", "still serving")


@pytest.mark.asyncio
async def test_another_learners_bank_is_not_opened_and_both_fingerprints_are_named(
    data_dir: Path, embedder: Embedder
) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder):
        pass
    with pytest.raises(CollectionMismatchError) as caught:
        await BankServer(config, HashEncoder("another learner"), embedder).start()
    assert spec_of().fingerprint in str(caught.value) and spec_of("another learner").fingerprint in str(caught.value)
    with pytest.raises(CollectionMismatchError, match="codec.*must be factors-4-1-8, got factors-4-0-8"):
        await BankServer(BankConfig(data_dir=data_dir, codec="factors-4-0-8"), HashEncoder(), embedder).start()
    async with BankServer(config, HashEncoder(), embedder):
        pass  # the failed starts let go of the directory


@pytest.mark.asyncio
async def test_a_collection_keeps_its_codec_without_being_told(data_dir: Path, embedder: Embedder) -> None:
    for codec in ("factors-2-1-4", None):
        config = BankConfig(data_dir=data_dir, codec=codec)
        async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
            stored = await client.put(f"made with {codec}", f"a text for {codec}")
            assert (await client.stats()).codec == "factors-2-1-4"
            ((_, record),) = await client.fetch([stored.gradient_digest])
            assert read_header(record).codec == "factors-2-1-4"


@pytest.mark.asyncio
async def test_a_port_in_use_is_an_error_that_leaves_nothing_behind(data_dir: Path, embedder: Embedder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=str(port)):
            await BankServer(BankConfig(data_dir=data_dir, port=port), HashEncoder(), embedder).start()
    async with BankServer(BankConfig(data_dir=data_dir, port=port), HashEncoder(), embedder) as server:
        assert server.address == BankAddress("127.0.0.1", port, None)


class SlowEncoder(HashEncoder):
    """Lets a test hold a document in the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def encode(self, documents: list[tuple[str, str]]) -> list[EncodedDocument]:  # type: ignore[override]
        self.loop.call_soon_threadsafe(self.entered.set)
        import time

        time.sleep(0.5)
        return super().encode(documents)


@pytest.mark.asyncio
async def test_a_stopping_bank_finishes_what_is_under_way_and_refuses_the_rest(
    data_dir: Path, embedder: Embedder
) -> None:
    encoder = SlowEncoder()
    server = BankServer(BankConfig(data_dir=data_dir), encoder, embedder)
    await server.start()
    async with Client(server.address.target) as client, Client(server.address.target) as late:
        putting = asyncio.create_task(client.put("a", "under way"))
        await encoder.entered.wait()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.1)
        await late.refused(late.stats(), UnavailableError)
        assert (await putting).version == 1
        await stopping
    async with (
        BankServer(BankConfig(data_dir=data_dir), encoder, embedder) as again,
        Client(again.address.target) as client,
    ):
        assert (await client.get("a")).document.text == "under way"


@pytest.mark.asyncio
async def test_a_drain_has_an_end(data_dir: Path, embedder: Embedder) -> None:
    server = BankServer(BankConfig(data_dir=data_dir, drain_seconds=0.2), HashEncoder(), embedder)
    await server.start()
    async with Client(server.address.target) as client:
        call = client.stub.IngestDocuments()  # a stream that its client never ends
        await call.write(pb.IngestDocumentsRequest(document=pb.Document(id="a", text="x")))
        assert (await call.read()).version == 1
        async with asyncio.timeout(10):
            await server.stop()


@pytest.mark.asyncio
async def test_a_port_for_metrics_that_is_taken_is_named_and_nothing_is_left_running(
    data_dir: Path, embedder: Embedder
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = BankServer(BankConfig(data_dir=data_dir, metrics_port=port), HashEncoder(), embedder)
        with pytest.raises(RuntimeError, match=rf"127\.0\.0\.1:{port} \(Address already in use\).* --metrics-port"):
            await server.start()
    async with BankServer(BankConfig(data_dir=data_dir, metrics_port=port), HashEncoder(), embedder) as server:
        assert server.address.metrics_port == port


@pytest.mark.asyncio
async def test_metrics_count_calls_documents_and_the_cache(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir, metrics_port=0)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        put = await client.put("a", "text")
        await client.fetch([put.gradient_digest])
        await client.refused(client.query(text="x"), Exception)  # type: ignore[arg-type]
        url = f"http://127.0.0.1:{server.address.metrics_port}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.read().decode()

        lines = set((await asyncio.to_thread(read)).splitlines())
    for line in (
        'regrad_bank_calls_total{code="OK",method="IngestDocuments"} 1.0',
        'regrad_bank_calls_total{code="INVALID_ARGUMENT",method="Query"} 1.0',
        'regrad_bank_call_seconds_count{method="FetchGradients"} 1.0',
        "regrad_bank_encode_batch_documents_count 1.0",
        "regrad_bank_sequence 1.0",
        "regrad_bank_indexed_sequence 1.0",
        "regrad_bank_encode_waiting 0.0",
    ):
        assert line in lines, line
    (free,) = [float(line.split()[1]) for line in lines if line.startswith("regrad_bank_free_disk_bytes ")]
    assert abs(free - shutil.disk_usage(data_dir).free) < 2**30


@pytest.mark.asyncio
async def test_a_restarted_bank_catches_its_index_up_and_rebuilds_a_corrupt_one(
    data_dir: Path, embedder: Embedder
) -> None:
    config = BankConfig(data_dir=data_dir, snapshot_every=5)

    async def hits(*, put: str = "", delete: str = "") -> dict[str, int]:
        async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
            found = {hit.id: hit.version for hit in (await client.query(text="number", top_k=64)).hits}
            if put:
                await client.put(put, f"number {put} again")
            if delete:
                await client.delete(delete)
            return found

    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.ingest(*({"id": str(n), "text": f"number {n}"} for n in range(12)))
        async with asyncio.timeout(10):
            while (await client.stats()).indexed_sequence < 12:  # what is not in the index yet isn't in its snapshot
                await asyncio.sleep(0.01)
    everything = {str(n): 1 for n in range(12)}
    assert json.loads((data_dir / "index" / "manifest.json").read_text())["sequence"] == 12
    assert await hits(put="3", delete="4") == everything
    expected = everything | {"3": 2}
    del expected["4"]
    (snapshot,) = (data_dir / "index").glob("*.usearch")
    older = snapshot.read_bytes()
    assert await hits() == expected
    snapshot.write_bytes(older[: len(older) // 2])
    assert await hits() == expected
    (data_dir / "index" / "manifest.json").write_text("not json")
    assert await hits() == expected


@pytest.mark.asyncio
async def test_a_snapshot_ahead_of_a_restored_catalog_is_rebuilt(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.put("old", "number one")
    backup = (data_dir / "catalog.sqlite").read_bytes()
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.put("new", "number two")
    (data_dir / "catalog.sqlite").write_bytes(backup)
    (data_dir / "blobs" / "sequence.json").unlink()  # without this, the older catalog is refused
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        assert [hit.id for hit in (await client.query(text="number", top_k=5)).hits] == ["old"]
        assert server.metrics.registry.get_sample_value("regrad_bank_indexed_sequence") == 1


@pytest.mark.asyncio
async def test_old_gradients_and_orphans_are_removed_from_disk(data_dir: Path, embedder: Embedder) -> None:
    config = BankConfig(data_dir=data_dir)
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        await client.ingest({"id": "a", "text": "one"}, {"id": "a", "text": "two"}, {"id": "b", "text": "three"})
        await client.delete("b")
    assert len(list((data_dir / "blobs").glob("??/*"))) == 1
    orphan = data_dir / "blobs" / "ab" / ("c" * 62)
    orphan.write_bytes(b"from a crash between blob and catalog")
    async with BankServer(config, HashEncoder(), embedder) as server, Client(server.address.target) as client:
        for _ in range(100):
            if not orphan.exists():
                break
            await asyncio.sleep(0.02)
        assert len(list((data_dir / "blobs").glob("??/*"))) == 1
        assert len((await client.query(document_ids=["a"], include_gradients=True)).hits[0].gradient) > 0
