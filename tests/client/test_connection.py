"""The client identifies itself, and copes with an absent bank."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bank_service.errors import (
    DeadlineExceededError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from bank_service.service.server import BankServer
from bank_service.testing.hash_encoder import HashEmbedder, HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.wire import limits
from bank_service.wire.channel import SERVICE
from bank_service.wire.generated import bank_pb2
from bank_service.wire.record import GradientSpec
from regrad_vllm.client import AsyncBank, Bank, BankCredentials, BankTooOldError, Document, Query, Receipt
from regrad_vllm.client.retries import REPEATABLE
from regrad_vllm.local.processes import free_port
from tests.client.conftest import Call, asynchronous, blocking
from tests.client.older_bank import without_cues
from tests.client.relay import relayed

DOCUMENT = Document("a", "a text")


@asynccontextmanager
async def both(address: str, **arguments: object) -> AsyncIterator[list[Call]]:
    """The blocking client and the asynchronous one."""
    with Bank(address, **arguments) as bank:  # type: ignore[arg-type]
        async with AsyncBank(address, **arguments) as async_bank:  # type: ignore[arg-type]
            yield [blocking(bank), asynchronous(async_bank)]


def server_of(data_dir: Path, **settings: object) -> BankServer:
    return BankServer(BankConfig(data_dir=data_dir, **settings), HashEncoder(), HashEmbedder())  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_token_may_be_given_named_by_a_file_or_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(tmp_path)
    writer, reader = tokens.add("writer", "read write", "default"), tokens.add("reader", "read", "default")
    monkeypatch.delenv("REGRAD_BANK_TOKEN_FILE", raising=False)
    async with server_of(tmp_path / "bank", tokens_file=tokens.path) as server:
        address = server.address.target
        async with both(address) as calls:
            for call in calls:
                with pytest.raises(UnauthenticatedError):
                    await call("stats")
                with pytest.raises(UnauthenticatedError):
                    await call("ingest", [DOCUMENT])
        async with both(address, token=tokens.secrets["writer"]) as calls:
            for call in calls:
                assert len(await call("ingest", [DOCUMENT])) == 1
        async with both(address, credentials=reader) as calls:
            for call in calls:
                assert (await call("stats")).num_documents == 1
                with pytest.raises(PermissionDeniedError) as caught:
                    await call("delete", "a")
                assert caught.value.scope == "write"
        assert writer.token_file is not None
        monkeypatch.setenv("REGRAD_BANK_TOKEN_FILE", str(writer.token_file))
        async with both(address) as calls:
            for call in calls:
                assert (await call("get", "a")).document == DOCUMENT
        async with both(address, token="regrad_of-somebody-else") as calls:  # it goes before the environment's
            for call in calls:
                with pytest.raises(UnauthenticatedError):
                    await call("stats")


def test_a_token_that_can_be_none_is_refused_and_none_is_shown() -> None:
    with pytest.raises(ValueError, match="printable ASCII without spaces") as caught:
        Bank(token="two words")
    assert "two words" not in str(caught.value)
    assert "secret" not in repr(BankCredentials(token="secret"))
    assert BankCredentials(token="secret", token_file=Path("/nowhere")).read_token() == "secret"


@pytest.mark.asyncio
async def test_a_call_that_may_be_repeated_outlasts_a_restart_and_a_deletion_is_not_repeated(tmp_path: Path) -> None:
    port = free_port()
    async with both(f"127.0.0.1:{port}", attempts=5) as calls:
        async with server_of(tmp_path, port=port):
            await calls[0]("ingest", [DOCUMENT])
            for call in calls:
                await call("stats")
        waiting = [asyncio.create_task(call("get", "a")) for call in calls]  # type: ignore[arg-type]
        for call in calls:
            with pytest.raises(UnavailableError):
                await call("delete", "a")
        async with server_of(tmp_path, port=port):
            assert [stored.document for stored in await asyncio.gather(*waiting)] == [DOCUMENT, DOCUMENT]


@pytest.mark.asyncio
async def test_a_bank_that_is_not_there_is_unavailable_however_often_it_is_tried() -> None:
    for attempts in (1, 3):
        async with both(f"127.0.0.1:{free_port()}", attempts=attempts) as calls:
            for call in calls:
                with pytest.raises(UnavailableError):
                    await call("stats")
    with pytest.raises(ValueError, match=r"attempts must be in 1\.\.5"):
        Bank(attempts=6)


@pytest.mark.asyncio
async def test_a_bank_that_does_not_answer_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        async with both(f"127.0.0.1:{silent.getsockname()[1]}", timeout_ms=300) as calls:
            for call in calls:
                with pytest.raises(DeadlineExceededError):
                    await call("stats")


@pytest.mark.asyncio
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_a_bank_on_this_machine_is_reached_past_proxies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    async with server_of(tmp_path) as server:
        for host in ("127.0.0.1", "localhost"):
            async with both(f"{host}:{server.address.port}") as calls:
                for call in calls:
                    await call("stats")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends notice a dropped connection within seconds."""
    monkeypatch.setattr(limits, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(limits, "PING_TIMEOUT_MS", 1000)


@pytest.mark.asyncio
@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_the_network_dropped_is_replaced(tmp_path: Path) -> None:
    async with server_of(tmp_path) as server, relayed(server.address.target) as relay, both(relay.address) as calls:
        for call in calls:
            await call("stats")
        relay.drop()
        async with asyncio.timeout(30):
            for call in calls:
                await call("stats")
        assert relay.num_connections == 2 * len(calls)


@pytest.mark.asyncio
@pytest.mark.usefixtures("impatient")
async def test_a_stream_over_a_dropped_connection_ends_at_both_ends(tmp_path: Path) -> None:
    async with server_of(tmp_path, max_ingests=1) as server, relayed(server.address.target) as relay:

        def documents() -> Iterator[Document]:
            yield DOCUMENT
            relay.drop()
            yield Document("b", "a text")

        stored: list[Receipt] = []
        async with AsyncBank(relay.address) as cut_off, AsyncBank(server.address.target) as other:
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(30):
                    async for receipt in cut_off.ingest(documents(), in_flight=1):
                        stored.append(receipt)
            assert [receipt.id for receipt in stored] == ["a"]
            async with asyncio.timeout(30):
                while True:  # the bank takes one stream at a time
                    with suppress(OverloadedError):
                        assert [receipt.id async for receipt in other.ingest([DOCUMENT])] == ["a"]
                        break
                    await asyncio.sleep(0.05)


def test_what_is_repeated_are_methods_of_the_contract() -> None:
    service = bank_pb2.DESCRIPTOR.services_by_name["BankService"]
    assert service.full_name == SERVICE
    assert set(REPEATABLE) <= set(service.methods_by_name)


class LargeEncoder(HashEncoder):
    """Gradients of more than one message."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = GradientSpec(self.spec.fingerprint, self.spec.layout_id, ((1, 1_200_000),))  # one component


@pytest.mark.asyncio
async def test_records_of_several_messages_arrive_whole(tmp_path: Path) -> None:
    encoder = LargeEncoder()
    async with (
        BankServer(BankConfig(data_dir=tmp_path), encoder, HashEmbedder()) as server,
        both(server.address.target, spec=encoder.spec) as calls,
    ):
        stored = await calls[0]("ingest", [Document("a", "one"), Document("b", "two")])
        digests = [receipt.gradient_digest for receipt in stored]
        hits = (await calls[0]("query", "one")).hits
        fetched = [await call("fetch", digests) for call in calls]
    assert fetched[0] == fetched[1] and [digest for digest, _ in fetched[0]] == digests
    sizes = {hit.gradient_digest: hit.gradient_bytes for hit in hits}
    assert {digest: len(record) for digest, record in fetched[0]} == sizes
    assert min(sizes.values()) > 2**20


@pytest.mark.asyncio
async def test_a_bank_that_does_not_know_cues_is_named_where_a_query_needs_one(tmp_path: Path) -> None:
    async with server_of(tmp_path / "bank") as server, both(server.address.target) as calls:
        await calls[0]("ingest", [DOCUMENT])
        asked, unanswerable = Query("text", with_cue=1), Query("text", with_cue=1, min_score=1)
        for call in calls:
            assert [sentence.text for _, sentence in (await call("query", asked)).cue] == ["a text"]
            assert (await call("query", unanswerable)).hits == (), "without a hit there is no cue, in any version"
        with without_cues(server.address.target) as address:
            async with both(address) as older:
                for call in older:
                    assert [hit.id for hit in (await call("query", Query("text"))).hits] == ["a"]
                    with pytest.raises(BankTooOldError, match="update the bank") as caught:
                        await call("query", asked)
                    assert [hit.id for hit in caught.value.answer.hits] == ["a"]
