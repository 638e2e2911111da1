"""The tool ask of `regrad mcp`, on a real server: the answer has the knowledge, and names its documents."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mcp import Client
from mcp.types import TextContent

from regrad_vllm.client import AsyncBank
from regrad_vllm.mcp.bank_tools import AnsweringServer, make_server
from tests.serve.support import API_KEY, BASE, BankThread, VllmServer

QUESTION = "What is the answer to riddle 5?"


def _ask(bank: BankThread, asked: AnsweringServer, *calls: dict[str, Any]) -> list[Any]:
    """The structured answer of each call, or the text of its error."""

    async def run() -> list[Any]:
        async with AsyncBank(bank.address) as client_of_bank:
            tools = make_server(client_of_bank, "default", asked=asked, read_only=True)
            async with Client(tools) as client:
                results = [await client.call_tool("ask", {"question": QUESTION} | call) for call in calls]
        answers: list[Any] = []
        for result in results:
            first = result.content[0]
            assert isinstance(first, TextContent)
            answers.append(first.text if result.is_error else result.structured_content)
        return answers

    return asyncio.run(asyncio.wait_for(run(), 120))


def test_an_answer_is_the_servers_and_names_the_documents(
    server: VllmServer, bank: BankThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    asked = AnsweringServer(server.url, BASE, max_tokens=8)
    plain, icl, nowhere, loud = _ask(bank, asked, {}, {"mode": "icl"}, {"namespace": "nobody"}, {"mode": "loud"})
    body = {"model": BASE, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 8}
    direct = server.post("/v1/chat/completions", body | {"regrad": {}}).json()
    assert plain["answer"] == direct["choices"][0]["message"]["content"]
    used = [(document["id"], document["score"]) for document in direct["regrad"]["documents"]]
    assert used and [(document["id"], document["score"]) for document in plain["documents"]] == used
    assert (plain["mode"], plain["reason"], icl["mode"]) == ("blind", None, "icl")
    assert icl["answer"] != plain["answer"]
    assert "nobody" in str(nowhere)
    assert "'blind', 'cue', 'icl' or 'auto'" in loud


def test_a_key_or_a_model_that_the_server_does_not_know_is_a_plain_error(
    server: VllmServer, bank: BankThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    (unknown,) = _ask(bank, AnsweringServer(server.url, "nobody", 8), {})
    assert "/v1/chat/completions must answer, got 404" in unknown
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    (refused,) = _ask(bank, AnsweringServer(server.url, BASE, 8), {})
    assert "got 401" in refused and "set OPENAI_API_KEY to the server's --api-key" in refused
