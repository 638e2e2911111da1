"""The policy for requests that have ReGrad only by default: a real bank client, arena and middleware, no engine."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import grpc
import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.serve.engine.serving import BaseServing

from bank_service.wire.errors import (
    BankError,
    LimitExceededError,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    UnavailableError,
    abort,
)
from bank_service.wire.generated import bank_pb2, bank_pb2_grpc
from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.middleware import RegradMiddleware, Runtime
from regrad_vllm.serve.api.plan import Planner
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.api.preparer import Preparer, as_request_error
from regrad_vllm.serve.api.routes import ROUTES_WITHOUT, SHAPES, TOKENIZING
from regrad_vllm.serve.api.used import UsedMemory
from regrad_vllm.serve.arena.arena import Arena
from regrad_vllm.serve.settings import Settings
from tests.serve.support import free_port
from tests.spans import recorded_spans


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.open(tmp_path / "arena", 2**20)
    yield made
    made.close()


async def ask(
    settings: Settings,
    learner: Learner,
    arena: Arena,
    body: dict[str, Any],
    path: str = "/v1/completions",
    headers: Mapping[str, str] | Sequence[tuple[str, bytes]] = (),
) -> httpx.Response:
    """One request through the middleware to a handler that says what body and id it got. No bank listens."""
    app = FastAPI()

    @app.post(path)
    async def completions(request: Request) -> dict[str, Any]:
        body = await request.json()
        given = body.get("request_id")
        return {"got": body, "id": given if path == "/v1/responses" else BaseServing._base_request_id(request, given)}

    app.add_middleware(RegradMiddleware)
    bank = AsyncBank(settings.bank, spec=learner.spec, timeout_ms=500, attempts=1)
    engine = Engine(None, [])  # never asked: without gradients there is nothing to compose
    metrics = Metrics.create(CollectorRegistry())
    app.state.regrad = Runtime(
        planner=Planner(settings, learner, ("base",)),
        preparer=Preparer(learner, bank, arena, engine, metrics, 2),
        engine=engine,
        metrics=metrics,
        memory=UsedMemory(10),
        adapter_names=frozenset,
        releases=set(),
    )
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)
    finally:
        await bank.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(learner=tmp_path, bank=f"127.0.0.1:{free_port()}", default=True)


def test_fail_open_answers_from_the_base_model_and_says_so(settings: Settings, learner: Learner, arena: Arena) -> None:
    answer = asyncio.run(ask(settings, learner, arena, {"model": "base", "prompt": "x"}))
    used = answer.json()["regrad"]
    assert answer.status_code == 200
    assert used["fallback"] is True and settings.bank in used["reason"] and used["adapter"] is None
    assert answer.headers["x-regrad-adapter"] == "none"
    assert answer.json()["got"]["prompt"] == "x"
    assert arena.figures().num_holds == 0


def test_fail_closed_refuses_where_regrad_is_the_default(settings: Settings, learner: Learner, arena: Arena) -> None:
    closed = replace(settings, on_error="fail_closed")
    answer = asyncio.run(ask(closed, learner, arena, {"model": "base", "prompt": "x"}))
    assert answer.status_code == 503
    assert arena.figures().num_holds == 0


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
WITHOUT_TEXT: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": [1, 2, 3]}, "regrad.query"),
    ("/v1/completions", {"prompt": [[1, 2], [3]]}, "regrad.query"),
    ("/v1/completions", {"prompt": ""}, "regrad.query"),
    ("/v1/completions", {"prompt_embeds": "x"}, "regrad.query"),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": "s"}]}, "regrad.query"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, "regrad.query"),
    ("/v1/chat/completions", {"messages": [IMAGE]}, "regrad.query"),
    ("/v1/responses", {"input": [{"type": "function_call_output", "output": "x"}]}, "regrad.query"),
    ("/v1/responses", {"input": "x", "background": True}, "background"),
]


@pytest.mark.parametrize(("path", "body", "field"), WITHOUT_TEXT)
def test_the_base_model_answers_clients_that_do_not_know_regrad_whatever_they_ask(
    settings: Settings, learner: Learner, arena: Arena, path: str, body: dict[str, Any], field: str
) -> None:
    answer = asyncio.run(ask(settings, learner, arena, {"model": "base", **body}, path))
    assert answer.status_code == 200, answer.text
    used = answer.json()["regrad"]
    assert used["fallback"] is True and field in used["reason"] and used["adapter"] is None
    assert answer.json()["got"] == {"model": "base", **body, "request_id": used["request_id"]}
    assert answer.headers["x-regrad-adapter"] == "none"
    closed = replace(settings, on_error="fail_closed")
    for server, fields in (
        (closed, {"model": "base"}),
        (settings, {"model": "base-regrad"}),
        (settings, {"regrad": {}}),
    ):
        error = asyncio.run(ask(server, learner, arena, {**fields, **body}, path)).json()["error"]
        assert (error["code"], error["param"]) == (400, field)


def test_without_a_bank_the_base_model_answers_each_of_several_prompts(
    settings: Settings, learner: Learner, arena: Arena
) -> None:
    body = {"model": "base", "prompt": ["a", "b"], "n": 2}
    answer = asyncio.run(ask(settings, learner, arena, body))
    used = answer.json()["regrad"]
    assert [(prompt["choices"], prompt["fallback"]) for prompt in used["prompts"]] == [([0, 1], True), ([2, 3], True)]
    assert all(settings.bank in prompt["reason"] for prompt in used["prompts"])
    assert answer.json()["got"] == {**body, "request_id": used["request_id"]}
    assert answer.headers["x-regrad-adapter"] == "none"
    answer = asyncio.run(ask(settings, learner, arena, {**body, "model": "base-regrad"}))
    assert answer.status_code == 503 and arena.figures().num_holds == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (["i" * 300], "i" * 300), (["one", "two"], "one"), (["\xe4/b"], "\xe4/b"),
        ([""], None), (["i" * 513], None), ([], None),
    ],
)  # fmt: skip
def test_a_request_has_one_id_everywhere(
    settings: Settings, learner: Learner, arena: Arena, path: str, sent: list[str], expected: str | None
) -> None:
    headers = [("X-Request-Id", value.encode("latin-1")) for value in sent]
    text = {"prompt": "x", "input": "x", "messages": [{"role": "user", "content": "x"}]}
    answer = asyncio.run(ask(settings, learner, arena, {"model": "base", **text}, path, headers=headers))
    id = answer.json()["regrad"]["request_id"]
    assert answer.json()["id"] == id and 0 < len(id) <= 512
    if path != "/v1/responses":  # there vLLM takes no id from the header
        assert id == expected or (expected is None and id not in sent)


@pytest.mark.parametrize("body", [{"model": "base-regrad"}, {"model": "base", "regrad": {}}, {"regrad": {}}])
def test_who_asks_by_name_is_refused_even_with_fail_open(
    settings: Settings, learner: Learner, arena: Arena, body: dict[str, Any]
) -> None:
    answer = asyncio.run(ask(settings, learner, arena, {**body, "prompt": "x"}))
    assert answer.status_code == 503 and json.loads(answer.text)["error"]["type"] == "ServiceUnavailableError"


def test_a_request_can_switch_the_default_off(settings: Settings, learner: Learner, arena: Arena) -> None:
    body = {"model": "base", "prompt": "x", "regrad": {"enabled": False}}
    answer = asyncio.run(ask(settings, learner, arena, body))
    assert answer.status_code == 200 and "regrad" not in {key for key in answer.json() if key != "got"}


def test_without_the_default_a_plain_request_passes_byte_for_byte(
    settings: Settings, learner: Learner, arena: Arena
) -> None:
    body = {"model": "base", "prompt": "x", "extra": [1, {"a": None}]}
    answer = asyncio.run(ask(replace(settings, default=False), learner, arena, body))
    assert answer.json()["got"] == body


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "identity, br"])
def test_a_packed_body_is_refused_because_regrad_could_hide_in_it(
    settings: Settings, learner: Learner, arena: Arena, encoding: str
) -> None:
    answer = asyncio.run(ask(settings, learner, arena, {"prompt": "x"}, headers={"content-encoding": encoding}))
    assert answer.status_code == 415 and "Content-Encoding must be identity" in answer.json()["error"]["message"]


def test_the_spelling_of_identity_does_not_matter(settings: Settings, learner: Learner, arena: Arena) -> None:
    answer = asyncio.run(ask(settings, learner, arena, {"prompt": "x"}, headers={"content-encoding": "Identity"}))
    assert answer.status_code == 200 and answer.json()["regrad"]["fallback"]


@pytest.mark.parametrize("path", sorted(ROUTES_WITHOUT))
def test_a_route_without_regrad_refuses_to_be_asked_for_it(
    settings: Settings, learner: Learner, arena: Arena, path: str
) -> None:
    answer = asyncio.run(ask(settings, learner, arena, {"prompt": "x", "regrad": {}}, path))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "regrad"
    assert path in error["message"] and "/v1/responses" in error["message"]
    answer = asyncio.run(ask(settings, learner, arena, {"prompt": "x", "model": "base-regrad"}, path))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model" and "got 'base-regrad'" in answer.json()["error"]["message"]
    bodies: list[dict[str, Any]] = [{}, {"model": "base"}, {"model": 3}, {"regrad": None}]
    for body in ({"prompt": "x", **fields} for fields in bodies):
        assert asyncio.run(ask(settings, learner, arena, body, path)).json()["got"] == body


@pytest.mark.parametrize("path", sorted(TOKENIZING))
def test_the_tokenizer_knows_every_name_that_the_server_lists(
    settings: Settings, learner: Learner, arena: Arena, path: str
) -> None:
    for name in ("base", "base-regrad"):
        answer = asyncio.run(ask(settings, learner, arena, {"model": name, "prompt": "x"}, path))
        assert answer.json()["got"] == {"model": "base", "prompt": "x"}
    answer = asyncio.run(ask(settings, learner, arena, {"model": "base-regrad", "prompt": "x", "regrad": {}}, path))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "regrad"


@pytest.mark.usefixtures("loggers")
def test_every_route_of_vllm_that_takes_a_models_name_is_known() -> None:
    app = FastAPI()
    app.state.args = Namespace()
    register_api_routers(app.state.args, app, ("generate", "render"))

    def names_a_model(route: APIRoute) -> bool:
        bodies = [field.field_info.annotation for field in route.dependant.body_params]
        kinds = [kind for body in bodies for kind in get_args(body) or (body,)]
        return any("model" in getattr(kind, "model_fields", {}) for kind in kinds)

    found = {route.path for route in app.routes if isinstance(route, APIRoute) and names_a_model(route)}
    assert "/v1/completions" in found and "/inference/v1/generate" in found
    assert found <= ROUTES_WITHOUT | TOKENIZING | set(SHAPES)


def test_a_body_of_any_other_route_is_not_read(settings: Settings, learner: Learner, arena: Arena) -> None:
    body = {"input": "x", "regrad": {}}
    assert asyncio.run(ask(settings, learner, arena, body, "/v1/embeddings")).json()["got"] == body


def test_texts_too_large_for_a_message_are_the_requests_own_fault() -> None:
    error = as_request_error(LimitExceededError("too much", limit="max_message_bytes"), "bank:1")
    assert (error.status, error.param) == (400, "regrad.mode") and "regrad.top_k" in error.message


class RefusingBank(bank_pb2_grpc.BankServiceServicer):
    """Answers each query with ``error``; or, where that is for the ``fetch``, with a document that can't be had."""

    def __init__(self, error: BankError | grpc.StatusCode, *, fetch: bool) -> None:
        self._error = error
        self._fetch = fetch

    async def Query(self, request: bank_pb2.QueryRequest, context: Any) -> bank_pb2.QueryResponse:  # noqa: N802
        if not self._fetch:
            await self._refuse(context)
        return bank_pb2.QueryResponse(hits=[bank_pb2.QueryResponse.Hit(id="a", score=1, gradient_digest="0" * 64)])

    async def FetchGradients(self, request: bank_pb2.FetchGradientsRequest, context: Any) -> None:  # noqa: N802
        await self._refuse(context)

    async def _refuse(self, context: Any) -> None:
        if isinstance(self._error, BankError):
            await abort(context, self._error)
        await context.abort(self._error, "Concurrent RPC limit exceeded!")  # as gRPC does by itself


@pytest.mark.parametrize("fetch", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (OverloadedError("busy", limit="max_queries", retry_after_ms=1000), 503, "1"),
        (OverloadedError("busy", limit="max_queries", retry_after_ms=2001), 503, "3"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 503, "1"),
        (QuotaExceededError("n", limit="max_namespace_requests", namespace="n", retry_after_ms=1000), 503, "1"),
        (QuotaExceededError("n", limit="max_namespace_bytes", namespace="n"), 503, None),
        (UnavailableError("stopping"), 503, "1"),
        (PermissionDeniedError("no", scope="read", namespace="n"), 503, None),
        (LimitExceededError("too much", limit="max_message_bytes"), 400, None),
    ],
)
def test_when_the_bank_says_when_to_come_back_the_client_is_told(
    settings: Settings,
    learner: Learner,
    arena: Arena,
    error: BankError | grpc.StatusCode,
    status: int,
    retry_after: str | None,
    fetch: bool,
) -> None:
    async def run() -> httpx.Response:
        server = grpc.aio.server()
        bank_pb2_grpc.add_BankServiceServicer_to_server(RefusingBank(error, fetch=fetch), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            body = {"model": "base-regrad", "prompt": "x"}
            return await ask(replace(settings, bank=f"127.0.0.1:{port}"), learner, arena, body)
        finally:
            await server.stop(None)

    answer = asyncio.run(run())
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert answer.json()["error"]["code"] == status and arena.figures().num_holds == 0


def test_spans_belong_to_the_requests_own_trace(
    settings: Settings, learner: Learner, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = recorded_spans(monkeypatch)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asyncio.run(ask(settings, learner, arena, {"model": "base", "prompt": "x"}, headers={"traceparent": parent}))
    spans: dict[str, Any] = {span.name: span for span in exporter.get_finished_spans()}
    assert {"regrad.prepare", "regrad.retrieve"} <= set(spans)
    assert all(f"{span.context.trace_id:032x}" == parent.split("-")[1] for span in spans.values())
    assert spans["regrad.retrieve"].parent.span_id == spans["regrad.prepare"].context.span_id
    assert not spans["regrad.retrieve"].status.is_ok, "there was no bank to retrieve from"
