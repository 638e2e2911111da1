from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bank_service.service.server import BankServer
from bank_service.testing.client import Client, own_errors, upload_of
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.values.embedder import Embedder
from bank_service.wire.credentials import BankCredentials
from bank_service.wire.errors import BankError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.record import DEFAULT_CODEC, encode_gradient

DOCUMENT = {"namespace": "theirs", "id": "a", "text": "a text"}
# One request of each method, for a namespace of somebody else.
REQUESTS: dict[str, Any] = {
    "IngestDocuments": pb.IngestDocumentsRequest(document=pb.Document(**DOCUMENT)),
    "IngestGradients": pb.IngestGradientsRequest(
        header=pb.IngestGradientsRequest.Header(document=pb.Document(**DOCUMENT), record_bytes=200)
    ),
    "DeleteDocument": pb.DeleteDocumentRequest(namespace="theirs", id="a"),
    "GetDocument": pb.GetDocumentRequest(namespace="theirs", id="a"),
    "ListDocuments": pb.ListDocumentsRequest(namespace="theirs"),
    "Query": pb.QueryRequest(namespace="theirs", text="a text", top_k=1),
    "BatchQuery": pb.BatchQueryRequest(
        queries=[
            pb.QueryRequest(namespace="theirs", document_ids=["a"]),
            pb.QueryRequest(namespace="theirs", document_ids=["a"]),
        ]
    ),
    "FetchGradients": pb.FetchGradientsRequest(digests=["0" * 64]),
    "GetStats": pb.GetStatsRequest(),
    "RecodeCollection": pb.RecodeCollectionRequest(codec=DEFAULT_CODEC),
    "UpgradeLearner": pb.UpgradeLearnerRequest(action=pb.UpgradeLearnerRequest.STATUS),
    "CreateSnapshot": pb.CreateSnapshotRequest(target="no/absolute/path"),
}
WITHOUT_NAMESPACE = {"FetchGradients", "GetStats", "CreateSnapshot", "RecodeCollection", "UpgradeLearner"}
METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["BankService"].methods}


async def call(client: Client, name: str) -> None:
    """The method with its request; the bank's own error where it is refused."""
    request: Any = REQUESTS[name]
    if METHODS[name].client_streaming:
        request = iter([request])
    async with own_errors():
        answer = getattr(client.stub, name)(request)
        if METHODS[name].server_streaming:
            async for _ in answer:
                pass
        else:
            await answer


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(tmp_path)


@pytest_asyncio.fixture
async def guarded(tokens: Tokens, data_dir: Path, embedder: Embedder) -> AsyncIterator[BankServer]:
    config = BankConfig(data_dir=data_dir, tokens_file=tokens.path)
    async with BankServer(config, HashEncoder(), embedder) as running:
        yield running


def of(server: BankServer, credentials: BankCredentials | None = None) -> Client:
    return Client(server.address.target, credentials)


@pytest.mark.asyncio
async def test_every_method_asks_for_a_token(guarded: BankServer, tokens: Tokens, tmp_path: Path) -> None:
    tokens.add("somebody", "read", "ours")
    wrong = tmp_path / "wrong"
    wrong.write_text("regrad_guessed")
    for credentials in (None, BankCredentials(token_file=wrong)):
        async with of(guarded, credentials) as client:
            for name in METHODS:
                error = await client.refused(call(client, name), UnauthenticatedError)
                assert "regrad_guessed" not in error.message


@pytest.mark.asyncio
async def test_no_method_reaches_into_a_namespace_that_the_token_does_not_name(
    guarded: BankServer, tokens: Tokens
) -> None:
    async with (
        of(guarded, tokens.add("theirs", "admin", "theirs")) as theirs,
        of(guarded, tokens.add("ours", "admin", "ours")) as ours,
    ):
        errors = []
        for _ in range(2):  # before the namespace is there, and after
            for name in METHODS.keys() - WITHOUT_NAMESPACE:
                error = await ours.refused(call(ours, name), PermissionDeniedError)
                errors.append((name, error.message, error.fields()))
            await theirs.ingest(DOCUMENT)
        half = len(errors) // 2
        assert half == len(METHODS) - len(WITHOUT_NAMESPACE) and sorted(errors[:half], key=str) == sorted(
            errors[half:], key=str
        )
        assert (await theirs.get("a", "theirs")).version == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ("read", {"GetDocument", "ListDocuments", "Query", "BatchQuery"}),
        ("write", {"IngestDocuments", "DeleteDocument"}),
        ("admin", {"GetDocument", "ListDocuments", "Query", "BatchQuery", "IngestDocuments", "DeleteDocument"}),
    ],
)
@pytest.mark.parametrize("namespace", ["theirs", "*"])
async def test_a_scope_allows_its_methods_and_no_others(
    guarded: BankServer, tokens: Tokens, scopes: str, allowed: set[str], namespace: str
) -> None:
    async with (
        of(guarded, tokens.add("owner", "write", "theirs")) as owner,
        of(guarded, tokens.add("caller", scopes, namespace)) as caller,
    ):
        passed = set()
        for name in METHODS.keys() - WITHOUT_NAMESPACE - {"IngestGradients"}:
            await owner.ingest(DOCUMENT)
            try:
                await call(caller, name)
                passed.add(name)
            except PermissionDeniedError as error:
                assert error.scope in ("read", "write") and error.namespace in ("theirs", "")
    assert passed == allowed


@pytest.mark.asyncio
async def test_what_concerns_everything_is_for_the_admin_of_everything(
    guarded: BankServer, tokens: Tokens, tmp_path: Path
) -> None:
    request = pb.CreateSnapshotRequest(target=str(tmp_path / "snapshot"))
    for scopes, namespace in (("admin", "ours"), ("read write", "*")):
        async with of(guarded, tokens.add(f"{scopes} {namespace}", scopes, namespace)) as client:
            await client.refused(own(client.stub.CreateSnapshot(request)), PermissionDeniedError)
            await client.refused(call(client, "RecodeCollection"), PermissionDeniedError)
            await client.refused(call(client, "UpgradeLearner"), PermissionDeniedError)
    assert not (tmp_path / "snapshot").exists()
    async with of(guarded, tokens.add("operator", "admin", "*")) as operator:
        await own(operator.stub.CreateSnapshot(request))
        await call(operator, "RecodeCollection")
        await call(operator, "UpgradeLearner")
    assert (tmp_path / "snapshot").exists()


async def own(stream: Any) -> None:
    """Reads a stream to its end; the bank's own error where it is refused."""
    async with own_errors():
        async for _ in stream:
            pass


@pytest.mark.asyncio
async def test_each_document_of_a_stream_is_checked_before_its_record_is_read(
    guarded: BankServer, tokens: Tokens
) -> None:
    encoder = HashEncoder()
    record = encode_gradient(encoder.encode([("", "x")])[0].values, encoder.spec, DEFAULT_CODEC)
    own, other = (pb.Document(namespace=name, id="a", text="x") for name in ("ours", "theirs"))
    async with of(guarded, tokens.add("ours", "read write", "ours")) as ours:
        requests = [pb.IngestDocumentsRequest(document=document) for document in (own, other, own)]
        error = await ours.refused(ours.ingest_requests(*requests), PermissionDeniedError)
        assert error.index == 1
        assert (await ours.get("a", "ours")).version == 1
        # The header alone is refused: nobody waits for a record that may not come in.
        stream = ours.stub.IngestGradients()
        await stream.write(pb.IngestGradientsRequest(header=pb.IngestGradientsRequest.Header(document=other)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert len(await ours.upload(*upload_of(own, record))) == 1


@pytest.mark.asyncio
async def test_a_gradient_is_there_for_those_who_may_read_a_document_that_has_it(
    guarded: BankServer, tokens: Tokens
) -> None:
    async with (
        of(guarded, tokens.add("theirs", "read write", "theirs")) as theirs,
        of(guarded, tokens.add("ours", "read write", "ours")) as ours,
        of(guarded, tokens.add("writer", "write", "theirs")) as writer,
        of(guarded, tokens.add("operator", "admin", "*")) as operator,
    ):
        (put,) = await theirs.ingest(DOCUMENT)
        digest = put.gradient_digest
        (record,) = await theirs.fetch([digest])
        assert await operator.fetch([digest]) == [record]
        unknown = await ours.refused(ours.fetch(["0" * 64]), NotFoundError)
        for client in (ours, writer):
            hidden = await client.refused(client.fetch([digest]), NotFoundError)
            assert hidden.message.replace(digest, "0" * 64) == unknown.message
        # The same text is the same gradient: whoever has the text has it, until their own document goes.
        await ours.ingest({**DOCUMENT, "namespace": "ours"})
        assert await ours.fetch([digest]) == [record]
        await ours.delete("a", "ours")
        await ours.refused(ours.fetch([digest]), NotFoundError)
        assert await theirs.fetch([digest]) == [record]


@pytest.mark.asyncio
async def test_stats_and_pages_are_those_of_a_bank_without_the_others(guarded: BankServer, tokens: Tokens) -> None:
    async with (
        of(guarded, tokens.add("theirs", "read write", "theirs")) as theirs,
        of(guarded, tokens.add("ours", "read write", "ours")) as ours,
        of(guarded, tokens.add("operator", "admin", "*")) as operator,
    ):
        for id in ("a", "b"):
            await ours.ingest({"namespace": "ours", "id": id, "text": f"{id} text"})
        await ours.query(namespace="ours", text="text", top_k=1)  # the index has come as far as the catalog
        before = await ours.stats()
        assert {entry.namespace: entry.num_documents for entry in before.namespaces} == {"ours": 2}
        assert (before.num_documents, before.num_gradients, before.sequence) == (2, 2, 2)
        await theirs.ingest({"namespace": "theirs", "id": "aa", "text": "other"}, DOCUMENT)
        await theirs.fetch([(await theirs.get("aa", "theirs")).gradient_digest])
        assert await ours.stats() == before
        everything = await operator.stats()
        # "a text" is in both: one gradient, which counts for each of them.
        assert (everything.num_documents, everything.num_gradients, everything.sequence) == (4, 3, 4)
        page = await ours.list(namespace="ours", page_size=1)
        assert base64.urlsafe_b64decode(page.next_page_token) == b"a"
        rest = await ours.list(namespace="ours", page_token=page.next_page_token)
        assert [entry.id for entry in rest.documents] == ["b"]


@pytest.mark.asyncio
async def test_a_stream_of_documents_is_not_opened_to_who_may_write_nothing(
    guarded: BankServer, tokens: Tokens
) -> None:
    async with of(guarded, tokens.add("reader", "read", "*")) as reader:
        for open_stream in (reader.stub.IngestDocuments, reader.stub.IngestGradients):
            stream = open_stream()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()  # without having sent anything
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.asyncio
async def test_a_token_taken_away_is_refused_from_then_on_also_in_an_open_stream(
    guarded: BankServer, tokens: Tokens
) -> None:
    async with of(guarded, tokens.add("ours", "read write", "ours")) as ours:
        stream = ours.stub.IngestDocuments()
        request = pb.IngestDocumentsRequest(document=pb.Document(namespace="ours", id="a", text="x"))
        await stream.write(request)
        assert (await stream.read()).version == 1
        tokens.remove("ours")
        await ours.refused(ours.stats(), UnauthenticatedError)
        await stream.write(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.asyncio
async def test_a_file_that_got_broken_leaves_the_tokens_as_they_were(
    guarded: BankServer, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    async with of(guarded, tokens.add("ours", "read", "ours")) as ours, of(guarded) as nobody:
        await ours.stats()
        tokens.write("tokens = [")
        await ours.stats()
        await nobody.refused(nobody.stats(), UnauthenticatedError)
        assert "goes on with the tokens that it had read before" in caplog.text
        assert caplog.text.count("can't be used") == 1  # said once, not with each call


@pytest.mark.asyncio
async def test_health_stays_open(guarded: BankServer) -> None:
    async with grpc.aio.insecure_channel(guarded.address.target) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.asyncio
async def test_no_secret_is_in_a_log_an_error_or_a_repr(
    guarded: BankServer, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    credentials = tokens.add("ours", "read", "ours")
    secret = tokens.secrets["ours"]
    told = [repr(credentials), tokens.path.read_text()]
    async with of(guarded, credentials) as ours:
        told += [repr(ours.channel), str(vars(ours))]
        await ours.stats()
        for name in sorted(METHODS.keys() - {"GetStats"}):
            try:
                await call(ours, name)
            except BankError as error:
                told += [repr(error), str(error.__cause__)]
    assert len(told) > 8
    assert secret not in "".join(told) + caplog.text
