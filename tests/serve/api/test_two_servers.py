"""Two servers with one bank behind nginx, without an engine: routes decide which documents are where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.responses import JSONResponse

from regrad_vllm.learner import Learner
from regrad_vllm.local.processes import free_port
from regrad_vllm.serve.api.endpoint import routes
from tests.house.nginx import routing
from tests.serve.api.test_releases import EngineLists, app_of, serving
from tests.serve.support import BankThread

NUM_ROUTES = 40


async def answer(body: dict[str, Any], lora_name: str) -> JSONResponse:
    return JSONResponse({})


@asynccontextmanager
async def listening(bank: BankThread, learner: Learner, folder: Path) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    """The port of a server with the plugin's middleware and routes, and how to stop it."""
    folder.mkdir()
    async with serving(bank, learner, folder, EngineLists(), answer) as (http, _, arena, _):
        app = app_of(http)
        app.state.regrad_arena = arena
        app.include_router(routes())
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield port, server
        finally:
            server.should_exit = True
            await running


async def closed(port: int) -> None:
    """Returns when nobody listens at the port."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.02)


async def resident(port: int) -> set[str]:
    async with httpx.AsyncClient(trust_env=False) as client:
        told = (await client.get(f"http://127.0.0.1:{port}/v1/regrad/resident")).json()
    return {record["gradient_digest"] for record in told["records"]}


@pytest.mark.asyncio
async def test_documents_of_a_route_are_at_one_server_and_move_when_it_stops(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        ports, servers = zip(
            *[await stack.enter_async_context(listening(bank, learner, tmp_path / name)) for name in ("one", "two")],
            strict=True,
        )
        url = stack.enter_context(routing(tmp_path, *ports))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30, trust_env=False))

        async def used(number: int, route: str) -> str:
            """The gradient of the one document that a request named."""
            body = {"model": "base", "prompt": "x", "regrad": {"document_ids": [f"doc-{number}"]}}
            said = await client.post("/v1/completions", json=body, headers={"x-regrad-route": route})
            assert said.status_code == 200, said.text
            (document,) = said.json()["regrad"]["documents"]
            return str(document["gradient_digest"])

        wanted = {f"doc-{number}": await used(number, f"doc-{number}") for number in range(NUM_ROUTES)}
        again = {f"doc-{number}": await used(number, f"doc-{number}") for number in range(NUM_ROUTES)}
        first, second = [await resident(port) for port in ports]
        assert again == wanted and first | second == set(wanted.values())
        assert not first & second and min(len(first), len(second)) > NUM_ROUTES / 5
        servers[0].should_exit = True
        await closed(ports[0])
        for number in range(NUM_ROUTES):
            assert await used(number, f"doc-{number}") == wanted[f"doc-{number}"]
        assert await resident(ports[1]) == set(wanted.values()), "the bank had what the other server took along"
