"""One HTTP request in ASGI: its headers, its body, and the same request with another body."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers

from regrad_vllm.serve.api.answer import Message, Send
from regrad_vllm.serve.api.request_errors import RequestError
from regrad_vllm.serve.api.routes import Body

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 64 * 2**20
_REQUEST_ID_HEADER = "x-request-id"
_RANK_HEADER = "x-data-parallel-rank"


def path_of(scope: Scope) -> str:
    """The path without the server's --root-path."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_json(scope: Scope) -> bool:
    """Whether the content type is JSON. vLLM refuses other types."""
    kind = _headers(scope).get("content-type", "")
    return kind.split(";")[0].strip().lower() == "application/json"


def request_id(scope: Scope) -> str | None:
    """The X-Request-Id header. None without one."""
    return _headers(scope).get(_REQUEST_ID_HEADER)


def wanted_rank(scope: Scope) -> int | None:
    """The data parallel rank that a router before this server has chosen, read as vLLM reads it."""
    value = _headers(scope).get(_RANK_HEADER, "")
    return int(value) if value.isdecimal() and value.isascii() else None


def check_encoding(scope: Scope) -> None:
    """RequestError for a compressed body, because a ``regrad`` object in it can't be read."""
    for encoding in _headers(scope).getlist("content-encoding"):
        if encoding.strip().lower() not in ("", "identity"):
            raise RequestError(
                415, f"Content-Encoding must be identity or absent, got {encoding[:80]!r}; send the JSON as it is"
            )


async def read_body(receive: Receive, max_bytes: int = MAX_BODY_BYTES) -> bytes | None:
    """The whole body. None if the client hung up. RequestError if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise RequestError(413, f"the body must be at most {max_bytes} bytes, got more")
        if not message.get("more_body", False):
            return bytes(body)


def parse(body: bytes) -> Body | None:
    """The body's JSON object. None for any other body, which vLLM refuses."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


class Replay:
    """An ASGI ``receive`` that first gives the body, which was read already, then the original messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self.disconnected = False

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        self.disconnected = self.disconnected or message["type"] == "http.disconnect"
        return message


def for_body(scope: Scope, num_bytes: int) -> Scope:
    """The scope for a changed body of this length."""
    return _with_header(scope, "content-length", str(num_bytes))


def with_request_id(scope: Scope, request_id: str | None) -> Scope:
    """The scope with another X-Request-Id. None: without one, because vLLM would take it before the body's id."""
    return _with_header(scope, _REQUEST_ID_HEADER, request_id)


async def send_error(send: Send, error: RequestError, *, anthropic: bool = False) -> None:
    """Sends OpenAI's error object. Anthropic's has one more field."""
    told = {"type": "error", **error.as_json()} if anthropic else error.as_json()
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in retry_header(error).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def retry_header(error: RequestError) -> dict[str, str]:
    """Retry-After in seconds, if another try may help."""
    return {} if error.retry_after_ms is None else {"retry-after": str(math.ceil(error.retry_after_ms / 1000))}


def _headers(scope: Scope) -> Headers:
    """The headers as vLLM reads them: where one comes twice, the first one counts."""
    return Headers(raw=scope["headers"])


def _with_header(scope: Scope, name: str, value: str | None) -> Scope:
    headers = [header for header in scope["headers"] if header[0].lower() != name.encode()]
    added = [] if value is None else [(name.encode(), value.encode("latin-1"))]
    return {**scope, "headers": [*headers, *added]}
