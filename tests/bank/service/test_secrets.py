"""Tokens and the password of Redis show nowhere: not in logs, spans, errors, figures or the bank's own files."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from google.protobuf import text_format
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.hash_encoder import BROKEN, HashEmbedder, HashEncoder
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.wire.channel import open_channel
from bank_service.wire.credentials import BankCredentials
from bank_service.wire.errors import BankError, from_rpc_error
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from regrad_vllm.cli import main
from tests.bank.service.test_access import METHODS, call
from tests.spans import recorded_spans


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Of bank and client, which are both of this process."""
    return recorded_spans(monkeypatch)


async def said_to(client: Client) -> list[str]:
    """Everything that the bank answers to a call of each method, as text."""
    answers = []
    for name in METHODS:
        try:
            await call(client, name)
        except BankError as error:
            cause = error.__cause__
            assert isinstance(cause, grpc.aio.AioRpcError)
            answers += [str(error), repr(error.fields()), repr(cause), repr(tuple(cause.trailing_metadata() or ()))]
    return answers


def said_by_the_blocking_client(target: str, credentials: BankCredentials) -> str:
    with open_channel(target, credentials) as channel:
        stub = bank_pb2_grpc.BankServiceStub(channel)
        try:
            stub.GetStats(bank_pb2.GetStatsRequest())
        except grpc.RpcError as error:
            return f"{error!r} {error} {from_rpc_error(error)}"
    return repr(channel)


@pytest.mark.asyncio
async def test_a_token_shows_nowhere(
    tmp_path: Path, data_dir: Path, caplog: pytest.LogCaptureFixture, spans: InMemorySpanExporter
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = Tokens(tmp_path)
    bearers = [
        tokens.add("operator", "admin", "*"),
        tokens.add("reader", "read", "theirs"),
        tokens.add("elsewhere", "read write", "ours"),
    ]
    unknown = tmp_path / "unknown.token"
    tokens.secrets["unknown"] = "regrad_" + secrets.token_urlsafe(32)
    unknown.write_text(tokens.secrets["unknown"])
    bearers.append(BankCredentials(token_file=unknown))
    config = BankConfig(data_dir=data_dir, tokens_file=tokens.path, metrics_port=0)
    said: list[str] = []
    async with BankServer(config, HashEncoder(), HashEmbedder()) as server:
        target = server.address.target
        for credentials in bearers:
            async with Client(target, credentials) as client:
                said += [repr(client.channel), repr(credentials), *(await said_to(client))]
            said.append(await asyncio.to_thread(said_by_the_blocking_client, target, credentials))
        async with Client(target, bearers[0]) as client:
            await client.refused(client.put("broken", BROKEN), BankError)  # an error of the bank, with its traceback
            said.append(text_format.MessageToString(await client.stats()))
        # A slip of the pen: the secret where its digest belongs, or as if it were a table.
        good = tokens.path.read_text()
        for line in (
            f'tokens."x" = {{ sha256 = "{tokens.secrets["operator"]}", scopes = ["read"], namespaces = ["a"] }}\n',
            f"tokens.{tokens.secrets['operator']} = {{ sha256 = '', scopes = [], namespaces = [] }}\n",
            f"{tokens.secrets['operator']} = 1\n",
            f"{tokens.secrets['operator']}\n",
        ):
            tokens.write(line + good)
            async with Client(target, bearers[0]) as client:
                await client.stats()
        with urlopen(f"http://127.0.0.1:{server.address.metrics_port}/metrics") as answer:
            said.append(answer.read().decode())
    said += [span.to_json() for span in spans.get_finished_spans()]
    said += [f"{record.getMessage()} {record.exc_text} {record.args}" for record in caplog.records]
    said.append(caplog.text)
    files = [path.read_bytes().decode("latin-1") for path in data_dir.rglob("*") if path.is_file()]

    everything = "\n".join([*said, *files])
    for expected in ("bank.Query", "UnauthenticatedError", "must have scope write", "out of memory", "tokens.x.sha256"):
        assert expected in everything, "else this test looks at the wrong things"
    assert caplog.text.count("the bank goes on with the tokens") == 4
    for name, secret in tokens.secrets.items():
        assert secret not in everything, f"the token {name!r} shows"
        assert secret.removeprefix("regrad_") not in everything


PASSWORD = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://:s3cret@h:26379/0",
        "redis+sentinel://:s3cret@h:26379",
        "redis+cluster://:s3cret@h:port,g",
        "redis+cluster://:s3cret/x@h:6379",
        "redis+cluster://h?sentinel_password=s3cret",
        "redis+other://:s3cret@h",
        "http://user:s3cret@h",
        ":s3cret@h:6379",
        "user:s3cret://h",
        "redis://:s3cret/x@h:6379/0",
        "redis://:s3cret?x@h:6379/0",
        "redis://:s3cret#x@h:6379/0",
        "redis://:12/s3cret@h:6379/0",
        "redis://:s3cret@h:port",
        "redis://:s3cret[@h",
    ],
)
def test_a_url_of_redis_that_cannot_be_used_is_refused_without_its_password(
    url: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "redis.url"
    file.write_text(url + "\n")
    file.chmod(0o600)
    for flags in (["--redis-url", url], ["--redis-url-file", str(file)]):
        assert main(["bank", "--data-dir", str(data_dir), "--port", "0", "--model", "/nowhere", *flags]) == 1
        said = capsys.readouterr().err
        assert said.startswith("regrad bank: redis_url") and said.count("\n") == 1
        assert PASSWORD not in said


def test_a_file_with_the_url_of_redis_that_everybody_may_read_is_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "redis.url"
    file.write_text(f"redis://:{PASSWORD}@h")
    file.chmod(0o644)
    command = ["bank", "--data-dir", str(data_dir), "--port", "0", "--model", "/nowhere"]
    assert main([*command, "--redis-url-file", str(file)]) == 1
    assert capsys.readouterr().err.startswith("regrad bank: redis_url_file must not be open to everybody, got ")
    assert main([*command, "--redis-url-file", str(file), "--redis-url", "redis://h"]) == 1
    assert "redis_url_file must be left out where redis_url is given" in capsys.readouterr().err


@pytest.mark.asyncio
@pytest.mark.parametrize("form", ["unix://:{password}@{path}", "unix://{path}?password={password}"])
async def test_the_password_of_redis_shows_nowhere(
    form: str, redis_server: str, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with Redis.from_url(redis_server) as redis:
        await redis.config_set("requirepass", PASSWORD)
    file = tmp_path / "redis.url"
    said = []
    for password in (PASSWORD, f"not-{PASSWORD}"):
        url = form.format(password=password, path=redis_server.removeprefix("unix://"))
        file.write_text(url)
        file.chmod(0o600)
        config = BankConfig(data_dir=data_dir, redis_url_file=file)
        async with BankServer(config, HashEncoder(), HashEmbedder()) as server, Client(server.address.target) as client:
            await client.put("a", "a text")
            await client.query(text="a text", top_k=1, include_gradients=True)
            assert (await client.stats()).cache_available is (password == PASSWORD)
        said.append(repr(BankConfig(data_dir=data_dir, redis_url=url)))
    assert "the gradient cache failed" in caplog.text, "else this test looks at the wrong things"
    assert PASSWORD not in "\n".join([caplog.text, *said, *(str(record.args) for record in caplog.records)])
