"""Mode auto: a first answer with sentences in the prompt is kept back. If the model is sure of it, the client gets it.

How sure it is, is the geometric mean of the probabilities of the answer's tokens. vLLM gives their logarithms, and the
client sees them only if it asked for them itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from regrad_vllm.serve.api.answer import Message, Send
from regrad_vllm.serve.api.routes import Body

_EVENT, _END = b"data: ", b"\n\n"


def with_log_probabilities(body: Body) -> Body:
    """The body that asks for the log-probability of each token of the answer."""
    if "messages" in body:
        return {**body, "logprobs": True}
    return body if body.get("logprobs") is not None else {**body, "logprobs": 0}


def unfit(body: Body) -> str | None:
    """Why a body can't have a first answer that is kept back, in a few words. None if it can."""
    if body.get("n") not in (None, 1):
        return "n other than 1"
    return next((f"{field}" for field in ("use_beam_search", "echo") if body.get(field)), None)


class KeptAnswer:
    """An ASGI ``send`` that keeps one answer, whole or a stream."""

    def __init__(self) -> None:
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")

    @property
    def succeeded(self) -> bool:
        """The answer is there and is no error."""
        return self._start is not None and self._start["status"] < 400

    def confidence(self) -> float | None:
        """0 to 1. None for an answer without tokens, such as an error."""
        if not self.succeeded:
            return None
        logarithms = [value for answer in self._objects() for value in _log_probabilities(answer)]
        return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None

    async def deliver(self, send: Send, body: Body) -> None:
        """Sends the answer. ``body``: of the client's own request, which may ask for log-probabilities."""
        if self._start is None:
            return
        content = bytes(self._body)
        if self.succeeded and body.get("logprobs") in (None, False):
            content = self._without_log_probabilities()
        headers = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() != b"content-length"]
        if not self._is_stream:
            headers.append((b"content-length", str(len(content)).encode()))
        await send({**self._start, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    @property
    def _is_stream(self) -> bool:
        assert self._start is not None
        headers = {name.lower(): value for name, value in self._start.get("headers", ())}
        return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))

    def _objects(self) -> Iterator[Any]:
        """The answer's JSON object, or those of all its events."""
        if not self._is_stream:
            yield json.loads(self._body)
            return
        for event in bytes(self._body).split(_END):
            if event.startswith(_EVENT + b"{"):
                yield json.loads(event[len(_EVENT) :])

    def _without_log_probabilities(self) -> bytes:
        if not self._is_stream:
            return json.dumps(_stripped(json.loads(self._body), stays=True), ensure_ascii=False).encode()
        events = []
        for event in bytes(self._body).split(_END):
            if event.startswith(_EVENT + b"{"):
                told = _stripped(json.loads(event[len(_EVENT) :]), stays=False)
                event = _EVENT + json.dumps(told, ensure_ascii=False).encode()
            events.append(event)
        return _END.join(events)


def _log_probabilities(answer: Any) -> Iterator[float]:
    for choice in answer.get("choices", ()):
        found = choice.get("logprobs") or {}
        tokens = (token["logprob"] for token in found.get("content") or ())
        yield from (value for value in (*tokens, *(found.get("token_logprobs") or ())) if value is not None)


def _stripped(answer: Any, *, stays: bool) -> Any:
    """The answer without log-probabilities. ``stays``: the field stays, as null."""
    for choice in answer.get("choices", ()):
        if "logprobs" in choice:
            choice["logprobs"] = None
            if not stays:
                del choice["logprobs"]
    return answer
