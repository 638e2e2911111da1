"""Several prompts in vLLM's own handler of /v1/completions; bank, arena and worker are real, the engine stood in."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.openai.completion.api_router import router
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM

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
from regrad_vllm.serve.seams.server_seams import install_served_call
from regrad_vllm.serve.settings import Settings
from tests.serve.api.test_releases import EngineLists
from tests.serve.support import BankThread, Worker

PROMPTS = [f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in (7, 42, 99)]
ASKED = {"model": "base-regrad", "prompt": PROMPTS, "max_tokens": 4, "temperature": 1.0}


class OneWord(AsyncLLM):
    """An engine that answers each prompt with the name of its adapter."""

    errored = False

    def __init__(self, model: Path) -> None:
        self.model_config = AsyncEngineArgs(model=str(model), dtype="float32", max_model_len=1024).create_model_config()
        self.vllm_config = VllmConfig(model_config=self.model_config)
        self.renderer = renderer_from_config(self.vllm_config)
        self.input_processor: Any = None

    def __del__(self) -> None:
        """There is no engine to end."""

    def check_admission(self, n: int = 1) -> None:
        """Every request is let in."""


async def generate(
    self: OneWord, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None, **_: Any
) -> AsyncIterator[RequestOutput]:
    await asyncio.sleep(0.01)
    outputs = [
        CompletionOutput(index, str(lora_request.lora_name), [1, 2], None, None, finish_reason="length")
        for index in range(params.n)
    ]
    yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, outputs, finished=True)


@pytest.fixture
def app(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    monkeypatch.setattr(AsyncLLM, "generate", generate)
    for place in ((BaseServing, "_maybe_get_adapters"), (OpenAIServingModels, "model_name")):
        monkeypatch.setattr(*place, inspect.unwrap(getattr(*place)))
    install_served_call()
    engine = OneWord(small_model)
    made = FastAPI()
    made.include_router(router)
    made.state.openai_serving_completion = OpenAIServingCompletion(
        engine,
        OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=str(small_model))]),
        online_renderer=OnlineRenderer(
            model_config=engine.model_config, renderer=engine.renderer, request_logger=None, chat_template=None,
            chat_template_content_format="auto",
        ),
        request_logger=None,
    )  # fmt: skip
    made.add_middleware(RegradMiddleware)
    yield made


def test_each_of_several_prompts_is_answered_with_its_own_documents(
    app: FastAPI, bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    async def check(http: httpx.AsyncClient, arena: Arena) -> None:
        body = {**ASKED, "n": 2, "regrad": {"top_k": 1}}
        answer = (await http.post("/v1/completions", json=body)).json()
        prompts = answer["regrad"]["prompts"]
        adapters = [prompt["adapter"] for prompt in prompts]
        assert [prompt["documents"][0]["id"] for prompt in prompts] == ["doc-7", "doc-42", "doc-99"]
        assert [prompt["choices"] for prompt in prompts] == [[0, 1], [2, 3], [4, 5]]
        assert [choice["text"] for choice in answer["choices"]] == [name for name in adapters for _ in range(2)]
        assert (answer["model"], answer["id"]) == ("base-regrad", "cmpl-" + answer["regrad"]["request_id"])
        streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
        lines = (await http.post("/v1/completions", json=streaming)).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [prompt["adapter"] for prompt in events[0]["regrad"]["prompts"]] == adapters
        texts = {choice["index"]: choice["text"] for event in events for choice in event["choices"]}
        assert texts == {choice["index"]: choice["text"] for choice in answer["choices"]}
        assert events[-1]["usage"] == {key: value for key, value in answer["usage"].items() if value is not None}
        icl = {**ASKED, "echo": True, "regrad": {"top_k": 1, "mode": "icl"}}
        choices = (await http.post("/v1/completions", json=icl)).json()["choices"]
        for choice, prompt in zip(choices, PROMPTS, strict=True):
            assert choice["text"].count(prompt) == 2, "as its document and as the question"
        assert arena.figures().num_holds == 0

    async def run() -> None:
        settings = Settings(learner=tmp_path, bank=bank.address)
        arena = Arena.open(tmp_path, 2**26)
        client = AsyncBank(settings.bank, spec=learner.spec)
        engine = Engine(EngineLists(), [[DoorClient(Worker(learner).door.address)]])
        metrics = Metrics.create(CollectorRegistry())
        app.state.regrad = Runtime(
            planner=Planner(settings, learner, ("base",)),
            preparer=Preparer(learner, client, arena, engine, metrics, 4),
            engine=engine,
            metrics=metrics,
            memory=UsedMemory(10),
            adapter_names=frozenset,
            releases=set(),
        )
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
                await check(http, arena)
        finally:
            await engine.close()
            await client.close()
            arena.close()

    asyncio.run(run())
