"""When the holds of a request with several prompts go; bank, arena and worker are real, vLLM's handler stood in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.seams import server_seams
from tests.serve.api.test_releases import EngineLists, eventually, serving
from tests.serve.support import BankThread, record_bytes

NUM_PROMPTS = 20


def body(first: int) -> dict[str, Any]:
    prompts = [f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in range(NUM_PROMPTS)]
    return {"model": "base", "prompt": prompts[first:] + prompts[:first], "regrad": {"top_k": 2}}


def adapters() -> list[str]:
    """The name of each prompt's adapter in the present call."""
    call = server_seams.SERVED_CALL.get()
    assert call is not None
    return [str(one.lora_request.lora_name) for one in call.prompt_calls if one.lora_request is not None]


def test_each_prompt_has_its_adapter_while_the_request_runs(bank: BankThread, learner: Learner, tmp_path: Path) -> None:
    async def run() -> None:
        both = asyncio.Event()

        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            await both.wait()
            return JSONResponse({"names": adapters()})

        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, arena, worker):
            asking = [asyncio.create_task(http.post("/v1/completions", json=body(first))) for first in (0, 7)]
            await eventually(lambda: len(worker.admissions) == 2 * NUM_PROMPTS)
            assert arena.figures().num_holds == 2 * NUM_PROMPTS
            both.set()
            for answer in await asyncio.gather(*asking):
                names = [prompt["adapter"] for prompt in answer.json()["regrad"]["prompts"]]
                assert answer.json()["names"] == names and len(set(names)) == NUM_PROMPTS
            assert arena.figures().num_holds == 0
            await eventually(lambda: len(worker.admissions) == worker.pool.figures().num_held == 0)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_prompt_that_can_not_be_prepared_is_the_requests_error_and_nothing_is_held(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    async def run() -> None:
        async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
            raise AssertionError("vLLM must not be asked")

        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, arena, worker):
            worker.pool._max_bytes = 3 * record_bytes(learner)
            answer = await http.post("/v1/completions", json=body(0))
            assert answer.status_code == 503 and "--regrad-worker-bytes" in answer.json()["error"]["message"]
            assert arena.figures().num_holds == 0
            await eventually(lambda: len(worker.admissions) == worker.pool.figures().num_held == 0)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("error", [ValueError("vLLM's"), RequestError(503, "ours")])
def test_a_request_that_fails_holds_what_the_engine_still_runs_and_nothing_else(
    bank: BankThread, learner: Learner, tmp_path: Path, error: Exception
) -> None:
    engine = EngineLists()

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        engine.begin(body["request_id"], adapters()[0])
        raise error

    async def run() -> None:
        async with serving(bank, learner, tmp_path, engine, handler) as (http, runtime, arena, worker):
            if isinstance(error, RequestError):
                assert (await http.post("/v1/completions", json=body(0))).status_code == 503
            else:
                with pytest.raises(ValueError, match="vLLM's"):
                    await http.post("/v1/completions", json=body(0))
            await eventually(lambda: arena.figures().num_holds == len(runtime.releases) == 1)
            engine.states.clear()  # the abort has arrived
            await eventually(lambda: arena.figures().num_holds == len(worker.admissions) == 0)

    asyncio.run(asyncio.wait_for(run(), 60))
