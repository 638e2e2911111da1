"""The token for the bank, in the server that has it: not in its status, answers, spans or logs."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from bank_service.service.server import BankServer
from bank_service.testing.client import Client
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from bank_service.wire.credentials import BankCredentials
from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api import endpoint
from regrad_vllm.serve.api.status import status_of
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread, DrawingEncoder
from tests.spans import recorded_spans


def test_the_banks_token_shows_neither_in_the_status_nor_in_answers_spans_or_logs(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="numba")  # it tells its compiler's every step
    exporter = recorded_spans(monkeypatch)
    tokens = Tokens(tmp_path)
    writer = tokens.add("writer", "read write", "default")
    other = tokens.add("other", "read", "elsewhere")
    unknown = tmp_path / "unknown.token"
    tokens.secrets["unknown"] = "regrad_" + secrets.token_urlsafe(32)
    unknown.write_text(tokens.secrets["unknown"])

    class Figured(EngineLists):
        async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> list[Any]:
            return [{}]

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse(body)

    async def said_with(target: str, token_file: Path, folder: Path, expected: int) -> str:
        """The status and an answer of a server with that token."""
        monkeypatch.setenv("REGRAD_BANK_TOKEN_FILE", str(token_file))
        bank = cast(BankThread, SimpleNamespace(address=target))
        async with serving(bank, learner, folder, Figured(), handler) as (http, runtime, arena, _):
            body = {"model": "base", "prompt": "x", "regrad": {"document_ids": ["a"]}}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == expected, answer.text
            app = FastAPI()
            app.include_router(endpoint.routes())
            client = AsyncBank(target, spec=learner.spec)
            app.state.regrad_status = status_of(runtime, arena, client, "float32")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as asking:
                status = await asking.get("/v1/regrad/status")
            await client.close()
            assert status.status_code == 200
            return f"{status.text} {answer.text} {answer.headers}"

    async def run() -> list[str]:
        config = BankConfig(data_dir=tmp_path / "bank", tokens_file=tokens.path)
        async with (
            BankServer(config, DrawingEncoder(learner)) as server,
            Client(server.address.target, writer) as client,
        ):
            await client.put("a", "a text")
            said = []
            for token_file, expected in ((writer.token_file, 200), (other.token_file, 503), (unknown, 503)):
                assert token_file is not None
                folder = tmp_path / f"arena-{token_file.stem}"
                said.append(await said_with(server.address.target, token_file, folder, expected))
            return said

    said = asyncio.run(run())
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    everything = "\n".join([*said, *spans, caplog.text, *(str(record.args) for record in caplog.records)])
    for expected in ('"num_documents":1', "the token must be one that this bank knows", "must have scope read",
                     "regrad.retrieve", "bank.Query"):  # fmt: skip
        assert expected in everything, "else this test looks at the wrong things"
    for name, secret in tokens.secrets.items():
        assert secret not in everything, f"the token {name!r} shows"
    assert BankCredentials(token_file=unknown).read_token() == tokens.secrets["unknown"]
