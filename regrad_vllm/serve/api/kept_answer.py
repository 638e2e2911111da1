"""Mode auto: a first answer with sentences in the prompt is kept back. If the model is sure of it, the client gets it.

The confidence is the geometric mean of the probabilities of the answer's tokens. vLLM gives their logarithms, and the
client sees them only if it asked for them itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from regrad_vllm.serve.api.answer import Message, Send
from regrad_vllm.serve.api.routes import Body

MAX_KEPT_BYTES = 2**20  # of a stream; a longer one is no short answer, and the client gets it at once
_EVENT, _END = b"data: ", b"\n\n"


def unfit(body: Body) -> str | None:
    """Why a body can't have a first answer that is kept back, in a few words. None if it can."""
    if body.get("n") not in (None, 1):
        return "n other than 1"
    if body.get("include_reasoning") is False:  # vLLM gives no log-probabilities then
        return "include_reasoning false"
    return next((field for field in ("use_beam_search", "echo") if body.get(field)), None)


def wants_log_probabilities(body: Body) -> bool:
    """Whether the client asks for log-probabilities, or for what vLLM refuses without them."""
    if "messages" in body:
        return any(body.get(field) not in (None, False) for field in ("logprobs", "top_logprobs", "logprob_token_ids"))
    return body.get("logprobs") is not None


def with_log_probabilities(body: Body) -> Body:
    """The body that asks for the log-probability of each token of the answer."""
    if wants_log_probabilities(body):
        return body
    return {**body, "logprobs": True if "messages" in body else 0}


class KeptAnswer:
    """An ASGI ``send`` that keeps one answer, whole or a stream, until it is delivered or forgotten."""

    def __init__(self, body: Body, send_for: Callable[[float | None], Send]) -> None:
        """``body``: of the client's request. ``send_for``: gives the ``send`` for this answer, by its confidence."""
        self._shows = wants_log_probabilities(body)
        self._send_for = send_for
        self._send: Send | None = None  # once the answer is delivered
        self._start: Message | None = None
        self._is_stream = False
        self._content = bytearray()  # without log-probabilities that nobody asked for
        self._rest = bytearray()  # not read yet
        self._sum, self._num_tokens = 0.0, 0
        self._has_error = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            more = bool(message.get("more_body", False))
            self._read(message.get("body", b""), more=more)
            if self._send is not None:
                await self._pass_on(more=more)
            elif more and len(self._content) > MAX_KEPT_BYTES:
                await self.deliver(more=True)

    @property
    def is_delivered(self) -> bool:
        return self._send is not None

    @property
    def succeeded(self) -> bool:
        """The answer is there and is no error."""
        return self._start is not None and self._start["status"] < 400 and not self._has_error

    @property
    def confidence(self) -> float | None:
        """0 to 1. None for an answer without tokens, and for an error."""
        return math.exp(self._sum / self._num_tokens) if self.succeeded and self._num_tokens else None

    async def deliver(self, send: Send | None = None, *, more: bool = False) -> None:
        """Sends what is kept, by another ``send`` if one is given. ``more``: the rest follows as it comes."""
        if self._start is None:
            return
        self._send = send or self._send_for(self.confidence)
        headers = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() != b"content-length"]
        if not self._is_stream:
            headers.append((b"content-length", str(len(self._content)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._pass_on(more=more)

    async def _pass_on(self, *, more: bool) -> None:
        assert self._send is not None
        body, self._content = bytes(self._content), bytearray()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _read(self, body: bytes, *, more: bool) -> None:
        self._rest += body
        while self._is_stream and (end := self._rest.find(_END)) >= 0:
            self._content += self._event(bytes(self._rest[:end])) + _END
            del self._rest[: end + len(_END)]
        if not more:
            whole = bytes(self._rest)
            self._content += whole if self._is_stream or not whole.startswith(b"{") else self._object(whole)
            self._rest.clear()

    def _event(self, event: bytes) -> bytes:
        return _EVENT + self._object(event[len(_EVENT) :]) if event.startswith(_EVENT + b"{") else event

    def _object(self, text: bytes) -> bytes:
        """Counts the log-probabilities of a JSON object, and takes them out if nobody asked for them."""
        told: dict[str, Any] = json.loads(text)
        self._has_error = self._has_error or told.get("error") is not None
        found = [choice for choice in told.get("choices") or () if choice.get("logprobs")]
        for choice in found:
            logprobs = choice["logprobs"]
            tokens = (token["logprob"] for token in logprobs.get("content") or ())
            for value in (*tokens, *(logprobs.get("token_logprobs") or ())):
                if value is not None:
                    self._sum, self._num_tokens = self._sum + value, self._num_tokens + 1
            if not self._shows:
                choice["logprobs"] = None
        return json.dumps(told, ensure_ascii=False).encode() if found and not self._shows else text


class OrElse:
    """An ASGI ``send`` for a second answer. An error of it is kept back, so that the first answer can be given."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.failed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 400
        if not self.failed:
            await self._send(message)
