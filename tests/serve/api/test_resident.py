"""GET /v1/regrad/resident: the gradients that a router finds at a server, behind the server's key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api import endpoint
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread

KEY = {"authorization": "Bearer key"}


def test_a_router_sees_the_documents_of_earlier_requests_and_needs_the_key(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    async def answer(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse({})

    async def run() -> None:
        async with serving(bank, learner, tmp_path, EngineLists(), answer) as (http, _, arena, _):
            used = []
            for ids in (["doc-1"], ["doc-2", "doc-1"]):
                body = {"model": "base", "prompt": "x", "regrad": {"document_ids": ids}}
                said = (await http.post("/v1/completions", json=body)).json()
                used.append({one["id"]: one["gradient_digest"] for one in said["regrad"]["documents"]})
            app = FastAPI()
            app.include_router(endpoint.routes())
            app.state.regrad_arena = arena
            app.add_middleware(AuthenticationMiddleware, tokens=["key"])
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as router:
                assert (await router.get("/v1/regrad/resident")).status_code == 401
                told = (await router.get("/v1/regrad/resident", headers=KEY)).json()
                least = (await router.get("/v1/regrad/resident?limit=1", headers=KEY)).json()
                assert (await router.get("/v1/regrad/resident?limit=0", headers=KEY)).status_code == 422
            uses = {record["gradient_digest"]: record["num_uses"] for record in told["records"]}
            assert uses == {used[1]["doc-1"]: 2, used[1]["doc-2"]: 1} and used[0]["doc-1"] in uses
            assert told["num_records"] == 2 and least["num_records"] == 2
            assert told["used_bytes"] == sum(record["num_bytes"] for record in told["records"]) <= told["max_bytes"]
            assert least["records"] == told["records"][:1]

    asyncio.run(run())
