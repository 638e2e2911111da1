"""Sends one streamed chat request and notes the time of each event that brings tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_DATA = "data: "
_DONE = "[DONE]"


class AnswerError(RuntimeError):
    """The server refused a request or broke off. The message is the server's."""


@dataclass(slots=True)
class Stream:
    """The answer so far."""

    event_times: list[float] = field(default_factory=list)  # time.perf_counter()
    ended: float | None = None  # time of the answer's end; None while it runs
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    regrad: Mapping[str, Any] = field(default_factory=dict)  # the answer's object "regrad": documents, times


async def stream_chat(client: httpx.AsyncClient, body: Mapping[str, Any], stream: Stream) -> None:
    """Sends a chat request and fills ``stream`` as events arrive. AnswerError, httpx.HTTPError."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode("utf-8", "replace")
            raise AnswerError(f"{response.status_code}: {text[:300]}")
        async for line in response.aiter_lines():
            if line == _DATA + _DONE:
                break
            if line.startswith(_DATA):
                _take(json.loads(line.removeprefix(_DATA)), stream)
    stream.ended = time.perf_counter()
    if not stream.output_tokens:
        raise AnswerError("the stream ended without a count of tokens")


def _take(event: Mapping[str, Any], stream: Stream) -> None:
    if "error" in event:
        raise AnswerError(str(event["error"])[:300])
    if event.get("regrad"):
        stream.regrad = event["regrad"]
    if event.get("usage"):
        stream.prompt_tokens = event["usage"]["prompt_tokens"]
        stream.output_tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        # vLLM first sends the role with an empty content, then the first token. Only the second counts.
        if "role" in delta and not delta.get("content"):
            continue
        if "content" in delta or choice.get("finish_reason"):
            stream.event_times.append(time.perf_counter())
            stream.text += delta.get("content") or ""
