"""Adds the used documents to vLLM's answer: two headers, and a ``regrad`` object in the JSON.

The object is inserted as bytes after the first brace, so vLLM's answer is neither parsed nor reordered. In a stream it
is inserted after the first brace of the first event. Anthropic's first event has the message as an object in it, which
gets it, so that Anthropic's client keeps it in the whole message.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from regrad_vllm.serve.api.used import Used, UsedByPrompts

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
_MAX_HELD_BYTES = 64 * 2**10  # a stream without an event in its first 64 KiB passes unchanged


class AnswerTagger:
    """An ASGI ``send`` that tags one answer. Errors (status 400 and above) pass unchanged."""

    def __init__(self, send: Send, used: Used | UsedByPrompts) -> None:
        self._send = send
        self._used = used
        self._start: Message | None = None  # the answer's headers, held back until the new length is known
        self._kind = b""
        self._held = bytearray()
        self._passing = False
        self.succeeded = False  # the answer has begun and is no error

    async def __call__(self, message: Message) -> None:
        if self._passing or message["type"] not in ("http.response.start", "http.response.body"):
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._begin(message)
        else:
            await self._continue(message)

    async def _begin(self, message: Message) -> None:
        self.succeeded = message["status"] < 400
        headers = [(name.lower(), value) for name, value in message.get("headers", ())]
        self._kind = next((value for name, value in headers if name == b"content-type"), b"").split(b";")[0].strip()
        if not self.succeeded or self._kind not in (b"application/json", b"text/event-stream"):
            self._passing = True
            await self._send(message)
            return
        self._start = {**message, "headers": [*headers, *self._used.headers()]}
        if self._kind == b"text/event-stream":  # sent at once, because the client waits for the stream to open
            await self._send_start(None)

    async def _continue(self, message: Message) -> None:
        self._held += message.get("body", b"")
        more = bool(message.get("more_body", False))
        if self._kind == b"text/event-stream":
            found = self._held.find(b"data: {")
            if found < 0 and more and len(self._held) < _MAX_HELD_BYTES:
                end = self._held.rfind(b"\n\n") + 2  # comments pass at once, because they keep the connection alive
                if end > 1:
                    await self._send({"type": "http.response.body", "body": bytes(self._held[:end]), "more_body": True})
                    del self._held[:end]
                return
            place = _first_object(self._held, found) if found >= 0 else -1
        elif more:
            return
        else:
            place = self._held.find(b"{")
        body = self._tagged(place)
        self._passing = True
        await self._send_start(len(body))
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send_start(self, num_bytes: int | None) -> None:
        if self._start is None:
            return
        start, self._start = self._start, None
        if num_bytes is not None:
            kept = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            start = {**start, "headers": [*kept, (b"content-length", str(num_bytes).encode())]}
        await self._send(start)

    def _tagged(self, place: int) -> bytes:
        """The held bytes with the ``regrad`` object after the brace at ``place``."""
        held = bytes(self._held)
        if place < 0 or held[place : place + 1] != b"{":
            return held
        rest = held[place + 1 :]
        comma = b"" if rest.lstrip().startswith(b"}") else b","
        return held[: place + 1] + b'"regrad":' + self._used.json_bytes() + comma + rest


def _first_object(held: bytearray, event: int) -> int:
    """The place of the object that is tagged, in a stream whose first event starts at ``event``."""
    start = event + len(b"data: ")
    message = b'{"type":"message_start","message":'
    return start + len(message) if held.startswith(message + b"{", start) else start
