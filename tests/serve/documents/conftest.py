"""The routes for documents over real HTTP in front of a real bank, without an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from bank_service.testing.hash_encoder import spec_of
from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import LearnerConfig
from regrad_vllm.local.processes import free_port
from regrad_vllm.serve.documents.document_routes import DocumentStore, document_routes
from regrad_vllm.serve.settings import Settings
from tests.client.conftest import bank_process

Serve = Callable[..., AbstractContextManager[httpx.Client]]


@contextmanager
def serving(address: str, add: Callable[[FastAPI], None] = lambda app: None, **given: Any) -> Iterator[httpx.Client]:
    """A client of the routes in front of the bank at ``address``. ``add`` adds others. More words are settings.

    They may write unless ``documents`` says otherwise.
    """
    settings = Settings(learner=Path("/nowhere"), bank=address, **{"documents": "write", **given})
    learner = LearnerConfig(base_digest="0" * 64, lora_alpha=8.0, step_size_kind="tie", score_temperature=0.2)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        credentials = settings.bank_credentials
        async with AsyncBank(address, credentials=credentials, spec=spec_of(), timeout_ms=20_000, attempts=1) as bank:
            app.state.regrad_documents = DocumentStore(bank, settings, learner, is_local=True)
            yield

    app = FastAPI(lifespan=lifespan)
    app.include_router(document_routes())
    add(app)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/regrad", timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="package")
def bank_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bank of these tests alone. Each test has its own namespace."""
    with bank_process(tmp_path_factory.mktemp("bank")) as (_, address):
        yield address


@pytest.fixture(scope="package")
def routes(bank_address: str) -> Iterator[httpx.Client]:
    with serving(bank_address) as client:
        yield client


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A namespace for one test."""
    return str(abs(hash(request.node.nodeid)))
