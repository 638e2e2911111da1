"""`regrad mcp` as the `mcp` package's own client sees it, over standard input and output and over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent

from regrad_vllm.cli import main
from regrad_vllm.client import AsyncBank, Bank, Document
from regrad_vllm.mcp.bank_tools import AnsweringServer, make_server
from tests.house.pages import examples

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def _over_stdio(*flags: str) -> AsyncIterator[Client]:
    """The client starts the server by the configuration in docs/mcp.md, and connects as most clients do."""
    (entry,) = json.loads(examples()["mcp_config"].code)["mcpServers"].values()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = entry["env"] | {"PATH": path, "PYTHONPATH": str(ROOT)}
    program = StdioServerParameters(command=entry["command"], args=[*entry["args"], *flags], env=environment)
    async with Client(program, mode="legacy") as client:
        assert "ask" in {tool.name for tool in (await client.list_tools()).tools}
        yield client


@contextmanager
def _http_server(host: str, token: str, *flags: str) -> Iterator[str]:
    """The URL of a server. An empty token: it wants none."""
    command = [sys.executable, "-m", "regrad_vllm.cli", "mcp", "--http", f"{host}:0", *flags]
    variables = {**os.environ, "REGRAD_MCP_TOKEN": token}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert line.startswith(f"MCP server at http://{host}:"), line
            yield line.split()[3].rstrip(";")
        finally:
            process.terminate()
            process.wait(30)


@asynccontextmanager
async def _over_http(*flags: str) -> AsyncIterator[Client]:
    """A server that wants a secret. A proxy asks it under a name of its own."""
    with _http_server("127.0.0.1", "secret", *flags) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = httpx2.post(url, json={}, headers=headers)
            assert (answer.status_code, answer.text[:34]) == (401, "a request must bring the header Au")
        async with (
            httpx2.AsyncClient(headers={"authorization": "Bearer secret", "host": "mcp.example"}) as http,
            Client(streamable_http_client(url, http_client=http)) as client,
        ):
            yield client


def test_without_a_secret_requests_under_another_name_and_from_other_sites_are_refused() -> None:
    """As those of a page are whose name was made to lead to this machine. The host is loopback, but not 127.0.0.1."""
    with _http_server("127.0.0.2", "") as url:
        name = url.split("/")[2]
        for headers, status in (
            ({"host": "example.com"}, 421),
            ({"host": f"example.com:{name.rpartition(':')[2]}"}, 421),
            ({"origin": "http://example.com"}, 403),
            ({}, 200),
            ({"origin": f"http://{name}"}, 200),
            ({"host": "localhost:1", "origin": "http://localhost:3000"}, 200),
        ):
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
            accepted = {"accept": "application/json, text/event-stream"}
            answer = httpx2.post(url, json=body, headers={**accepted, **headers})
            assert answer.status_code == status, (headers, answer.text)


def _error(result: CallToolResult) -> str:
    assert result.is_error
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def _use(client: Client) -> None:
    assert {"search", "get", "add", "delete"} <= {tool.name for tool in (await client.list_tools()).tools}

    async def call(name: str, **arguments: Any) -> Any:
        result = await client.call_tool(name, arguments)
        assert not result.is_error, result.content
        return result.structured_content

    added = await call("add", id="harbour", text="The harbour master of Orlen is Ada Quist.", title="Orlen")
    assert added == {"id": "harbour", "outcome": "created", "version": 1, "truncated": False}
    again = await call("add", id="harbour", text="The harbour master of Orlen is Ada Quist.", title="Orlen")
    assert again["outcome"] == "unchanged"
    await call("add", id="lamps", text="Its lamps burn oil.")
    found = await call("search", query="Who is the harbour master?", top_k=1)
    assert [(hit["id"], hit["title"]) for hit in found["documents"]] == [("harbour", "Orlen")]
    assert (await call("get", id="lamps"))["text"] == "Its lamps burn oil."
    assert await call("delete", id="lamps") == {"id": "lamps", "version": 1}
    for name, arguments, message in (
        ("get", {"id": "lamps"}, "'lamps'"),
        ("delete", {"id": "lamps"}, "'lamps'"),
        ("search", {"query": "x", "top_k": 65}, "less than or equal to 64"),
        ("search", {"query": " "}, "text must be 1..1048576 bytes of UTF-8 and not blank"),
        ("search", {"query": "x", "namespace": "no name!"}, "namespace must match"),
        ("add", {"id": "x", "text": "a\0b"}, "must not contain control characters"),
        ("add", {"id": "", "text": "x"}, "id must be 1 to 256 bytes, it is empty"),
    ):
        assert message in _error(await client.call_tool(name, arguments)), (name, arguments)


@pytest.mark.parametrize("over", [_over_stdio, _over_http])
def test_a_client_adds_finds_reads_and_deletes(address: str, over: Callable[..., Any]) -> None:
    namespace = f"mcp.{over.__name__}"

    async def run() -> None:
        async with over("--bank", address, "--namespace", namespace) as client:
            await _use(client)

    asyncio.run(asyncio.wait_for(run(), 120))
    with Bank(address) as bank:
        assert [entry.id for entry in bank.list(namespace=namespace)] == ["harbour"]


def test_a_document_that_is_replaced_keeps_its_metadata(address: str) -> None:
    metadata = {"lang": "en", "regrad.source": "/docs", "regrad.file": "pier.txt"}

    async def run() -> None:
        async with AsyncBank(address) as bank:
            documents = [Document("pier.txt", "The pier is open.", "Orlen", metadata)]
            assert [receipt async for receipt in bank.ingest(documents, namespace="mcp.metadata")]
            async with Client(make_server(bank, "mcp.metadata", asked=None, read_only=False)) as client:
                await client.call_tool("add", {"id": "pier.txt", "text": "The pier is closed."})
            stored = (await bank.get("pier.txt", namespace="mcp.metadata")).document
            assert stored == Document("pier.txt", "The pier is closed.", "", metadata)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_read_only_server_changes_nothing_and_a_bank_that_is_away_is_a_plain_error() -> None:
    async def run() -> None:
        asked = AnsweringServer("http://127.0.0.1:9", "m", max_tokens=8)
        async with (
            AsyncBank("127.0.0.1:9") as bank,
            Client(make_server(bank, "default", asked=asked, read_only=True)) as client,
        ):
            assert {tool.name for tool in (await client.list_tools()).tools} == {"search", "get", "ask"}
            assert "nknown tool" in _error(await client.call_tool("delete", {"id": "x"}))
            away = _error(await client.call_tool("search", {"query": "x"}))
            assert "the bank at 127.0.0.1:9 is not available; start it with `regrad bank`" in away
            asked_away = _error(await client.call_tool("ask", {"question": "Who?"}))
            assert "http://127.0.0.1:9/v1/chat/completions must answer" in asked_away
            assert "Input should be" in _error(await client.call_tool("ask", {"question": "Who?", "mode": "loud"}))

    asyncio.run(asyncio.wait_for(run(), 120))


def test_what_can_not_be_served_is_refused_at_the_start(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("REGRAD_MCP_TOKEN", raising=False)
    for flags, status, message in (
        (["--http", "0.0.0.0:0"], 2, "--http must be on loopback without a secret in REGRAD_MCP_TOKEN"),
        (["--server", "http://127.0.0.1:9"], 2, "--server and --model must be given together"),
        (["--http", address], 1, f"--http must be free to listen on, {address} is not"),
    ):
        assert main(["mcp", *flags]) == status
        assert message in capsys.readouterr().err
