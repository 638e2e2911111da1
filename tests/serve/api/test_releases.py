"""When a request's holds go: overlapping requests with one adapter; bank and arena are real, vLLM's lists stood in."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from bank_service.bank import Bank
from bank_service.records.record_reader import RecordReader
from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.door_client import DoorClient
from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.middleware import RegradMiddleware, Runtime
from regrad_vllm.serve.api.plan import Planner
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.api.preparer import Preparer
from regrad_vllm.serve.api.used import UsedMemory
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.seams import server_seams
from regrad_vllm.serve.settings import Settings
from regrad_vllm.serve.worker.device import Resident
from tests.serve.support import BankThread, Worker

CONCURRENCY = 4
BODY = {"model": "base", "prompt": "x", "regrad": {"document_ids": ["doc-1"]}}


class EngineLists:
    """An engine client that has vLLM's list of unfinished requests."""

    def __init__(self) -> None:
        self.states: dict[str, SimpleNamespace] = {}
        self.output_processor = SimpleNamespace(request_states=self.states)
        self.engine_core, self.core_engines = self, [b""]
        self._numbers = count()

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> list[None]:
        return [None]

    def begin(self, request_id: str, lora_name: str) -> str:
        engine_id = f"cmpl-{request_id}-0-{next(self._numbers):08x}"
        self.states[engine_id] = SimpleNamespace(lora_name=lora_name, external_req_id=f"cmpl-{request_id}-0")
        return engine_id


Handler = Callable[[dict[str, Any], str], Awaitable[JSONResponse]]


@asynccontextmanager
async def serving(
    thread: BankThread, learner: Learner, folder: Path, engine: EngineLists, handler: Handler, **given: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Runtime, Arena, Worker]]:
    """The middleware before ``handler(body, lora_name)``. ``given``: settings."""
    app = FastAPI()

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> JSONResponse:
        call = server_seams.SERVED_CALL.get()
        assert call is not None
        return await handler(await request.json(), call.lora_request.lora_name if call.lora_request else "")

    app.add_middleware(RegradMiddleware)
    settings = Settings(**{"learner": folder, "bank": thread.address, **given})
    arena = Arena.open(folder, 2**26)
    client = AsyncBank(settings.bank, spec=learner.spec)
    metrics = Metrics.create(CollectorRegistry())
    worker = Worker(learner)
    workers = Engine(engine, [[DoorClient(worker.door.address)]])
    runtime = app.state.regrad = Runtime(
        planner=Planner(settings, learner, ("base",)),
        preparer=Preparer(learner, client, arena, workers, metrics, CONCURRENCY),
        engine=workers,
        metrics=metrics,
        memory=UsedMemory(10),
        adapter_names=frozenset,
        releases=set(),
    )
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            yield http, runtime, arena, worker
    finally:
        await workers.close()
        await client.close()
        arena.close()


def test_overlapping_requests_with_one_adapter_hold_no_more_than_they_are(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    async def run() -> None:
        engine = EngineLists()
        most = {"holds": 0, "waiting": 0}

        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            engine_id = engine.begin(body["request_id"], lora_name)
            await asyncio.sleep(0.02)
            del engine.states[engine_id]
            return JSONResponse({})

        async with serving(bank, learner, tmp_path, engine, handler) as (http, runtime, arena, worker):

            async def client(delay: float) -> None:
                await asyncio.sleep(delay)
                for _ in range(10):
                    answer = await http.post("/v1/completions", json=BODY)
                    assert answer.status_code == 200, answer.text
                    most["holds"] = max(most["holds"], arena.figures().num_holds)
                    most["waiting"] = max(most["waiting"], len(runtime.releases))

            # The adapter is in use all the time, as under steady traffic on one passage set.
            engine.begin("another", (await name_of(http, runtime)))
            await asyncio.gather(*(client(0.007 * number) for number in range(CONCURRENCY)))
            assert most["holds"] <= CONCURRENCY and most["waiting"] == 0, most
            assert arena.figures().num_holds == len(runtime.releases) == 0
            await eventually(lambda: len(worker.admissions) == 0)

    asyncio.run(run())


async def eventually(holds: Callable[[], bool]) -> None:
    """The door is asked without waiting for it."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


async def name_of(http: httpx.AsyncClient, runtime: Runtime) -> str:
    return str((await http.post("/v1/completions", json=BODY)).json()["regrad"]["adapter"])


def test_a_failed_request_waits_for_its_own_and_for_no_others(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    async def run() -> None:
        engine = EngineLists()
        own: list[str] = []

        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            own.append(engine.begin(body["request_id"], lora_name))
            engine.begin("another", lora_name)  # never ends
            engine.begin(body["request_id"] + "0", lora_name)  # nor does this one, whose id starts alike
            return JSONResponse({"error": "x"}, status_code=500)

        async with serving(bank, learner, tmp_path, engine, handler) as (http, runtime, arena, worker):
            answer = await http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
            assert answer.status_code == 500
            await asyncio.sleep(0.15)
            assert arena.figures().num_holds == len(runtime.releases) == 1, "its own still runs"
            assert len(worker.admissions) == 1 and worker.pool.figures().num_held == 1
            engine.begin("mine", engine.states[own[0]].lora_name)  # the next request by the same id
            del engine.states[own[0]]
            await asyncio.wait_for(asyncio.gather(*runtime.releases), 5)
            assert arena.figures().num_holds == arena.figures().num_held == len(runtime.releases) == 0
            await eventually(lambda: len(worker.admissions) == 0)
            assert worker.pool.figures().num_held == 0

    asyncio.run(run())


def _scope(app: FastAPI) -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": "/v1/completions", "root_path": "", "query_string": b"", "app": app,
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip


class _Client:
    """A client by hand: what it sends, when it hangs up, and when it reads."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.error: Exception | None = None  # what ``receive`` raises instead of a hang-up
        self.sent: list[Any] = []
        self._messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self.gone.wait()
        if self.error is not None:
            raise self.error
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)


@pytest.mark.parametrize("error", [None, OSError("the connection broke")])
def test_a_client_that_hangs_up_while_its_documents_are_loaded_leaves_nothing(
    bank: BankThread, learner: Learner, tmp_path: Path, error: Exception | None
) -> None:
    async def run() -> None:
        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            raise AssertionError("vLLM must not be asked")

        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, runtime, arena, worker):
            loading = _SlowLoading(worker)
            client, app = _Client(), app_of(http)
            asked = asyncio.create_task(app(_scope(app), client.receive, client.send))
            await eventually(loading.begun.is_set)
            assert arena.figures().num_holds == 1
            client.error = error
            client.reads.set()
            client.gone.set()
            if error is None:
                await asyncio.wait_for(asked, 5)
            else:
                with pytest.raises(OSError, match="broke"):
                    await asyncio.wait_for(asked, 5)
            assert arena.figures().num_holds == 0 and bool(client.sent) is (error is not None)
            loading.go_on.set()
            await eventually(lambda: worker.pool.figures().num_documents == 1)
            await eventually(lambda: len(worker.admissions) == 0)

    asyncio.run(run())


@pytest.mark.parametrize(("part", "method"), [(Bank, "query"), (RecordReader, "read")])
def test_clients_that_hang_up_while_the_bank_searches_or_reads_leave_nothing(
    bank: BankThread, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: type, method: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    works = getattr(part, method)

    async def works_later(*given: Any) -> Any:
        begun.set()
        assert await asyncio.to_thread(go_on.wait, 20)
        return await works(*given)

    async def run() -> None:
        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            return JSONResponse({})

        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, arena, worker):
            monkeypatch.setattr(part, method, works_later)
            app = app_of(http)
            for _ in range(CONCURRENCY + 1):  # each gives back its permit to ask the bank
                client = _Client()
                asked = asyncio.create_task(app(_scope(app), client.receive, client.send))
                await eventually(begun.is_set)
                assert arena.figures().num_holds == 1
                client.reads.set()
                client.gone.set()
                await asyncio.wait_for(asked, 5)
                assert not client.sent and arena.figures().num_holds == 0
                begun.clear()
            go_on.set()
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200
            await eventually(lambda: len(worker.admissions) == arena.figures().num_held == 0)

    try:
        asyncio.run(run())
    finally:
        go_on.set()


@pytest.mark.parametrize("ended", [False, True])
def test_a_handler_that_is_cancelled_while_it_prepares_leaves_nothing(
    bank: BankThread, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    async def run() -> None:
        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            raise AssertionError("vLLM must not be asked")

        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, runtime, arena, worker):
            client, app = _Client(), app_of(http)
            prepare = runtime.preparer.prepare
            asked: list[asyncio.Task[None]] = []

            async def ends_as_it_is_cancelled(plan: Any, rank: int | None = None) -> Any:
                prepared = await prepare(plan, rank)
                asked[0].cancel()
                return prepared

            if ended:
                monkeypatch.setattr(runtime.preparer, "prepare", ends_as_it_is_cancelled)
            loading = _SlowLoading(worker)
            if ended:
                loading.go_on.set()
            asked.append(asyncio.create_task(app(_scope(app), client.receive, client.send)))
            if not ended:
                await eventually(loading.begun.is_set)
                asked[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked[0]
            assert arena.figures().num_holds == 0
            loading.go_on.set()
            await eventually(lambda: worker.pool.figures().num_documents == 1)
            await eventually(lambda: len(worker.admissions) == 0)

    asyncio.run(run())


class _SlowLoading:
    """A worker's device that loads documents when ``go_on`` is set."""

    def __init__(self, worker: Worker) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._load = worker.device.load
        worker.device.load = self._wait  # type: ignore[method-assign]

    def _wait(self, arena: str, digest: str) -> Resident:
        self.begun.set()
        assert self.go_on.wait(10)
        return self._load(arena, digest)


def app_of(http: httpx.AsyncClient) -> Any:
    return http._transport.app  # type: ignore[attr-defined]
