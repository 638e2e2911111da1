"""When the holds of a request with several prompts go; bank, arena and worker are real, vLLM's handler stood in."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from regrad_vllm.learner import Learner
from regrad_vllm.serve import vllm_server_seams
from regrad_vllm.serve.request_errors import RequestError
from regrad_vllm.serve.vllm_server_seams import ServedCall
from tests.serve.support import BankThread
from tests.serve.test_releases import EngineLists, serving

NUM_PROMPTS = 20  # the worker has six slots


def body(first: int) -> dict[str, Any]:
    prompts = [f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in range(NUM_PROMPTS)]
    return {"model": "base", "prompt": prompts[first:] + prompts[:first], "regrad": {"top_k": 2}}


def current_call() -> ServedCall:
    call = vllm_server_seams.SERVED_CALL.get()
    assert call is not None and call.prompt_call is not None
    return call


async def adapter(call: ServedCall, number: int) -> str:
    assert call.prompt_call is not None
    async with call.prompt_call(number) as one:
        await asyncio.sleep(0.01)
        assert one.lora_request is not None
        return str(one.lora_request.lora_name)


def test_large_requests_do_not_block_each_other(bank: BankThread, learner: Learner, tmp_path: Path) -> None:
    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        call = current_call()
        return JSONResponse({"names": await asyncio.gather(*(adapter(call, n) for n in range(NUM_PROMPTS)))})

    async def run() -> None:
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, arena, worker):
            answers = await asyncio.gather(*(http.post("/v1/completions", json=body(first)) for first in (0, 7)))
            for answer in answers:
                names = [prompt["adapter"] for prompt in answer.json()["regrad"]["prompts"]]
                assert answer.json()["names"] == names and len(set(names)) == NUM_PROMPTS
            assert arena.figures().num_leases == 0
            while worker.composer.figures()["num_tickets"]:  # the releases are on their way
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("error", [ValueError("vLLM's"), RequestError(503, "ours")])
def test_prompts_that_never_start_hold_nothing_once_the_request_is_over(
    bank: BankThread, learner: Learner, tmp_path: Path, error: Exception
) -> None:
    late: list[ServedCall] = []

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        late.append(current_call())
        await adapter(late[0], 1)
        raise error

    async def run() -> None:
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, arena, _worker):
            if isinstance(error, RequestError):
                answer = await http.post("/v1/completions", json=body(0))
                assert (answer.status_code, answer.json()["error"]["message"]) == (503, "ours")
            else:
                with pytest.raises(ValueError, match="vLLM's"):
                    await http.post("/v1/completions", json=body(0))
            assert arena.figures().num_leases == 0
            for number in (1, 2):
                with pytest.raises(RequestError, match="must start once"):
                    await adapter(late[0], number)

    asyncio.run(run())


def test_a_prompt_that_fails_ends_its_holds_when_the_engine_is_done(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    engine = EngineLists()

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        call = current_call()
        assert call.prompt_call is not None
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(call.prompt_call(0))
            assert one.lora_request is not None
            engine.begin(body["request_id"], one.lora_request.lora_name)
            raise RequestError(503, "ours")

    async def run() -> None:
        async with serving(bank, learner, tmp_path, engine, handler) as (http, runtime, arena, _):
            assert (await http.post("/v1/completions", json=body(0))).status_code == 503
            assert (arena.figures().num_leases, len(runtime.releases)) == (1, 1)
            engine.states.clear()  # the abort has arrived
            while runtime.releases:
                await asyncio.sleep(0.01)
            assert arena.figures().num_leases == 0

    asyncio.run(asyncio.wait_for(run(), 60))
