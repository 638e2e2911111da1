"""Streams as vLLM sends them, from a real HTTP response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from regrad_vllm.load.streaming import AnswerError, Stream, stream_chat

ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "regrad": {"adapter": "x"}}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


def token(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, **more}]}


def asked(events: list[dict[str, Any]] | Response) -> Stream:
    app = FastAPI()

    @app.post("/v1/chat/completions", response_model=None)
    async def answer(body: dict[str, Any]) -> Response:
        assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["model"] == "m"
        if isinstance(events, Response):
            return events

        async def lines() -> AsyncIterator[str]:
            for event in events:
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def run() -> Stream:
        stream = Stream()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await stream_chat(client, {"model": "m"}, stream)
        return stream

    return asyncio.run(run())


def test_a_stream_is_its_text_its_tokens_and_a_time_for_each_event() -> None:
    stream = asked([ROLE, token("An "), token(""), token("answer", finish_reason="stop"), USAGE])
    assert stream.text == "An answer"
    assert len(stream.event_times) == 3, "the role is no token, one without text is"
    assert stream.event_times == sorted(stream.event_times)
    assert (stream.prompt_tokens, stream.output_tokens) == (9, 3)
    assert stream.regrad == {"adapter": "x"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (JSONResponse({"error": "too long"}, 400), "400: .*too long"),
        ([token("a"), {"error": {"message": "engine died"}}], "engine died"),
        ([token("a")], "without a count of tokens"),
    ],
)
def test_a_refused_or_broken_stream_is_an_error(answer: Any, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        asked(answer)
