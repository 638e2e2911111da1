"""Runs the tools over standard input and output, or over HTTP."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from mcp.server import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from bank_service.wire.ports import target_of
from regrad_vllm.client import AsyncBank

MakeServer = Callable[[AsyncBank], MCPServer[Any]]


async def serve_stdio(address: str, make: MakeServer) -> None:
    """Serves the program that started this one, until it closes standard input."""
    async with AsyncBank(address) as bank:
        await make(bank).run_stdio_async()


async def serve_http(address: str, make: MakeServer, listening: socket.socket, host: str, token: str | None) -> None:
    """Serves http://host:port/mcp until Ctrl-C.

    listening: a socket that listens on the host. token: a secret that each request must bring. None: there is none,
    and the host is loopback. Then requests for another host are refused, and those from the page of another site.
    """
    hosts = [f"{name}:*" for name in ("127.0.0.1", "localhost", "[::1]")] + [
        target_of(host, listening.getsockname()[1])
    ]
    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=token is None,
        allowed_hosts=hosts,
        allowed_origins=[f"http://{name}" for name in hosts],
    )
    async with AsyncBank(address) as bank:
        app: ASGIApp = make(bank).streamable_http_app(transport_security=security, stateless_http=True)
        config = uvicorn.Config(app if token is None else _Gate(app, token), log_level="warning")
        await uvicorn.Server(config).serve(sockets=[listening])


class _Gate:
    """Lets requests pass that bring the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = PlainTextResponse("a request must bring the header Authorization: Bearer TOKEN", 401)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
