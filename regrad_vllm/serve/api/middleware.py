"""The ASGI middleware: it gets each request before vLLM's handlers and prepares its documents.

The endpoint plugin adds it in ``attach_router``, not by ``--middleware``. So vLLM's own middleware runs first, and a
request without a valid API key never reaches the bank.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bank_service.wire.tracing import REQUEST_ID, REQUEST_MODEL, extract, span
from regrad_vllm.serve.api import http_request
from regrad_vllm.serve.api.answer import AnswerTagger, Send
from regrad_vllm.serve.api.engine import Engine
from regrad_vllm.serve.api.hang_up import unless_gone
from regrad_vllm.serve.api.http_request import App, Receive, Replay, Scope
from regrad_vllm.serve.api.kept_answer import KeptAnswer, OrElse, with_log_probabilities
from regrad_vllm.serve.api.plan import Plan, Planner, PromptPlans
from regrad_vllm.serve.api.plugin_metrics import Metrics
from regrad_vllm.serve.api.preparer import PreparedRequest, Preparer
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.request_holds import RequestHolds
from regrad_vllm.serve.api.routes import (
    ROUTES_WITHOUT,
    SHAPES,
    TOKENIZING,
    Body,
    PromptShape,
    join_prompts,
    split_prompts,
)
from regrad_vllm.serve.api.several_prompts import SeveralPrompts
from regrad_vllm.serve.api.used import Used, UsedByPrompts, UsedMemory
from regrad_vllm.serve.seams.server_seams import ServedCall, make_served_call, served_call

_METRICS = "/metrics"
_SECOND_FAILED = "the model was not sure, and a second answer, with the documents in the prompt, failed"
Prepared = PreparedRequest | SeveralPrompts | Used  # Used: the base model answers


@dataclass(frozen=True)
class Runtime:
    """The parts that handle requests, stored in ``app.state.regrad`` when vLLM has started its engine."""

    planner: Planner
    preparer: Preparer
    engine: Engine
    metrics: Metrics
    memory: UsedMemory
    adapter_names: Callable[[], frozenset[str]]  # the LoRA adapters that vLLM serves by name
    releases: set[asyncio.Task[None]]  # tasks that release holds when the engine is done


class RegradMiddleware:
    """Plans each request, prepares its documents, lets vLLM answer with them, and tags the answer."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and http_request.path_of(scope) == _METRICS:
            await scope["app"].state.regrad.preparer.observe()
        path = http_request.path_of(scope) if scope["type"] == "http" and scope["method"] == "POST" else ""
        shape = SHAPES.get(path)
        ours = path in ROUTES_WITHOUT or path in TOKENIZING if shape is None else http_request.is_json(scope)
        if not ours:
            await self._app(scope, receive, send)
            return
        runtime: Runtime = scope["app"].state.regrad
        try:
            http_request.check_encoding(scope)
            body = await http_request.read_body(receive)
            if body is None:  # the client hung up
                return
            document = http_request.parse(body)
            if shape is None and document is not None:
                _check_absent(document, path, runtime.planner)
                body = _with_base_name(document, body, runtime.planner)
                scope = http_request.for_body(scope, len(body))
            plan = _plan(document, shape, scope, runtime) if document is not None and shape is not None else None
            if document is None or shape is None or plan is None:
                await self._app(scope, Replay(body, receive), send)
                return
            prepared = (
                plan
                if isinstance(plan, Used)
                else await unless_gone(
                    _prepare(plan, document, scope, runtime),
                    receive,
                    partial(_drop, runtime),
                )
            )
            if prepared is not None:
                await self._serve(prepared, document, shape, scope, receive, send)
        except RequestError as error:
            runtime.metrics.errors.labels(status=str(error.status)).inc()
            await http_request.send_error(send, error, anthropic=path == "/v1/messages")

    async def _serve(
        self,
        prepared: Prepared,
        document: Body,
        shape: PromptShape,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Runs vLLM's handler, with the adapter if there is one, and releases the holds."""
        runtime: Runtime = scope["app"].state.regrad
        holds = _holds(prepared, runtime)
        clean = False
        try:
            used = prepared if isinstance(prepared, Used) else prepared.used
            runtime.memory.add(used)
            runtime.metrics.requests.labels(outcome=_outcome(used), mode=used.mode).inc()
            ask = partial(self._ask, shape=shape, scope=scope, receive=receive)
            if used.mode == "auto" and isinstance(prepared, PreparedRequest) and prepared.placement is not None:
                clean = await _answer_or_ask_again(ask, prepared, document, send, runtime)
            else:
                tagger = AnswerTagger(send, used)
                heard = await ask(prepared, document, send=tagger)
                clean = tagger.succeeded and heard
        finally:
            if holds is not None:
                holds.release(clean=clean)

    async def _ask(
        self, prepared: Prepared, document: Body, *, shape: PromptShape, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        """Runs vLLM's handler with the body's ``document``. False if the client hung up."""
        runtime: Runtime = scope["app"].state.regrad
        request_id = prepared.request_id if isinstance(prepared, Used) else prepared.used.request_id
        call, changed = _for_vllm(prepared, request_id, document, shape, runtime.planner)
        body = json.dumps(changed).encode()
        replay = Replay(body, receive)
        with served_call(call):
            await self._app(_for_body(scope, len(body), shape, request_id), replay, send)
        return not replay.disconnected


async def _answer_or_ask_again(
    ask: Callable[..., Awaitable[bool]], prepared: PreparedRequest, document: Body, send: Send, runtime: Runtime
) -> bool:
    """Mode auto: asks with sentences in the prompt. If the model isn't sure, asks again with the documents.

    If the second answer is an error, such as for a prompt that is too long, the client gets the first one. True if the
    client got a whole answer that is no error.
    """
    found = prepared.found

    def first(confidence: float | None, reason: str | None = found.used.reason) -> Send:
        used = replace(found.used, mode="cue", confidence=confidence, reason=reason)
        runtime.memory.add(used)
        return AnswerTagger(send, used)

    kept = KeptAnswer(document, first)
    if not await ask(prepared, with_log_probabilities(document), send=kept):
        return False
    confidence = kept.confidence
    if kept.is_delivered:
        return kept.succeeded
    if confidence is None or confidence >= found.min_confidence:
        await kept.deliver()
        return kept.succeeded
    runtime.metrics.second_answers.inc()
    used = replace(found.used, mode="icl", cue=(), confidence=confidence)
    runtime.memory.add(used)
    tagger = AnswerTagger(send, used)
    second = OrElse(tagger)
    again = replace(prepared, found=replace(found, used=used, texts=found.whole))
    heard = await ask(again, document, send=second)
    if heard and second.failed:
        await kept.deliver(first(confidence, _SECOND_FAILED))
        return kept.succeeded
    return heard and tagger.succeeded


def _for_body(scope: Scope, num_bytes: int, shape: PromptShape, request_id: str) -> Scope:
    """The scope for the changed body, with the request's id where vLLM looks for it."""
    if shape.id_from_header:
        scope = http_request.with_request_id(scope, None if shape.id_in_body else request_id)
    return http_request.for_body(scope, num_bytes)


def _check_absent(document: Body, path: str, planner: Planner) -> None:
    """RequestError if the request asks for ReGrad on a route that doesn't support it."""
    supported = f"{', '.join(SHAPES)} support it"
    if document.get("regrad") is not None:
        raise RequestError(400, f"regrad must be absent on {path}, got it; {supported}", "regrad")
    model = document.get("model")
    if isinstance(model, str) and model in planner.regrad_names and path not in TOKENIZING:
        allowed = f"without ReGrad on {path}, such as {planner.model_names[0]}"
        raise RequestError(400, f"model must be one {allowed}, got {model!r}; {supported}", "model")


def _with_base_name(document: Body, body: bytes, planner: Planner) -> bytes:
    """The body. If it has a model's name with ReGrad, the same with the base model's name."""
    model = document.get("model")
    name = planner.base_name(model)
    return json.dumps({**document, "model": name}).encode() if isinstance(model, str) and name != model else body


def _plan(document: Body, shape: PromptShape, scope: Scope, runtime: Runtime) -> Plan | PromptPlans | Used | None:
    return runtime.planner.plan(document, shape, http_request.request_id(scope), runtime.adapter_names())


async def _prepare(plan: Plan | PromptPlans, document: Body, scope: Scope, runtime: Runtime) -> Prepared:
    """The prepared request. If the policy allows a fallback: the reason why the base model answers. RequestError."""
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    rank = http_request.wanted_rank(scope)
    attributes = {REQUEST_ID: plan.request_id, REQUEST_MODEL: _answered_by(document, runtime.planner)}
    with span("regrad.prepare", extract(headers), **attributes):
        if isinstance(plan, PromptPlans):
            prompts = SeveralPrompts(plan, runtime.engine, runtime.releases)
            return await prompts.prepare(runtime.planner, runtime.preparer, rank)
        try:
            return await runtime.preparer.prepare(plan, rank)
        except RequestError as error:
            if plan.by_name:
                raise
            return runtime.planner.without_documents(plan.request_id, error)


def _for_vllm(
    prepared: Prepared, request_id: str, document: Body, shape: PromptShape, planner: Planner
) -> tuple[ServedCall, Body]:
    """The arguments for vLLM's handler: (adapter, body)."""
    model = document.get("model")
    body: Body = {name: value for name, value in document.items() if name != "regrad"}
    body = {**body, "model": planner.base_name(model), "request_id": request_id}
    answered_by = _answered_by(document, planner)
    if isinstance(prepared, SeveralPrompts):
        parts = [
            _with_prompts(part, prepared.texts(number), shape, planner) if prepared.has_adapter(number) else part
            for number, part in enumerate(split_prompts(body, shape))
        ]
        return prepared.call(answered_by), join_prompts(body, parts, shape)
    if isinstance(prepared, Used) or prepared.placement is None:
        return ServedCall(None, answered_by), body
    body = _with_prompts(body, prepared.found.texts, shape, planner)
    placement = prepared.placement
    return make_served_call(placement.recipe, answered_by, placement.data_parallel_rank), body


def _answered_by(document: Body, planner: Planner) -> str:
    """The model's name in the request, or the base model's first one."""
    model = document.get("model")
    return model if isinstance(model, str) else planner.model_names[0]


def _with_prompts(body: Body, texts: Sequence[tuple[str, str]], shape: PromptShape, planner: Planner) -> Body:
    """The body with the learner's system prompt, and with these (title, text) of sentences or documents in its
    question. There are none in mode blind."""
    prompts = planner.learner.config.prompts
    if texts:
        rendered = [prompts.render_document(title, text) for title, text in texts]
        changed = shape.with_question(body, lambda question: prompts.render_icl(question, rendered))
        if changed is None:
            raise AssertionError("text for the prompt was planned for a body without a question")
        body = changed
    return shape.with_system(body, prompts.system) if planner.settings.system_prompt and prompts.system else body


def _holds(prepared: Prepared, runtime: Runtime) -> RequestHolds | SeveralPrompts | None:
    """The holds of a prepared request. None if the base model answers."""
    if isinstance(prepared, PreparedRequest):
        return RequestHolds(prepared, runtime.engine, runtime.releases)
    return prepared if isinstance(prepared, SeveralPrompts) else None


def _drop(runtime: Runtime, prepared: Prepared) -> None:
    holds = _holds(prepared, runtime)
    if holds is not None:
        holds.let_go()


def _outcome(used: Used | UsedByPrompts) -> str:
    prompts = used.prompts if isinstance(used, UsedByPrompts) else (used,)
    if any(prompt.adapter for prompt in prompts):
        return "adapter"
    return "fallback" if any(prompt.fallback for prompt in prompts) else "base"
