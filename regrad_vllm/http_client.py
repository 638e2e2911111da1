"""HTTP clients of OpenAI-compatible servers: the key, proxies, and errors of one line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bank_service.wire.ports import is_loopback

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "OPENAI_API_KEY"
_MAX_SHOWN = 300  # characters of a server's answer


class ServerError(RuntimeError):
    """A server is away or refuses. ``status`` is the status of its answer; None if there is none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def connect(server: str, timeout_s: float) -> httpx.AsyncClient:
    """A client of ``server`` (http://host:port) with any number of connections. It sends the key in OPENAI_API_KEY.

    It reaches this machine without a proxy. ServerError if the environment's proxies can't be used, ValueError if the
    key can't.
    """
    import httpx

    headers = _headers()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    with _usable_proxies():
        transport = httpx.AsyncHTTPTransport(limits=limits) if _is_here(server) else None
        return httpx.AsyncClient(
            base_url=server, timeout=timeout_s, headers=headers, limits=limits, transport=transport
        )


def get(server: str, path: str, timeout_s: float = 30.0, *, with_key: bool = True) -> httpx.Response:
    """A server's answer to a GET. ServerError if it is no success, ValueError if the key can't be used."""
    import httpx

    headers = _headers() if with_key else {}
    with _usable_proxies():
        transport = httpx.HTTPTransport() if _is_here(server) else None
        client = httpx.Client(base_url=server, timeout=timeout_s, headers=headers, transport=transport)
    with server_errors(), client:
        return client.get(path).raise_for_status()


def served_models(server: str, model_name: str) -> list[str]:
    """The names that a server serves. ServerError; ValueError if ``model_name`` is none of them."""
    served = [model["id"] for model in get(server, "/v1/models").json()["data"]]
    if model_name not in served:
        raise ValueError(f"--model-name must be one that {server} serves ({', '.join(served)}), got {model_name!r}")
    return served


@contextmanager
def server_errors() -> Iterator[None]:
    """Turns httpx's errors inside the context into ServerError."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        said = " ".join(error.response.text.split())[:_MAX_SHOWN]
        advice = f"; set {KEY_VARIABLE} to the server's --api-key" if status == 401 else ""
        raise ServerError(f"{error.request.url} must answer, got {status}: {said}{advice}", status) from error
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ServerError(f"{error.request.url} must answer, got {reason}; is the server running?") from error


def _headers() -> Mapping[str, str]:
    """The key's header. ValueError without the key's text for a key that no header can have."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{KEY_VARIABLE} must be printable ASCII, got other characters in it; copy the key again")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _is_here(server: str) -> bool:
    return is_loopback(urlsplit(server).hostname or "")


@contextmanager
def _usable_proxies() -> Iterator[None]:
    """Turns the errors of httpx for proxies that it can't use into ServerError, without a proxy's password."""
    import httpx

    rule = "http_proxy, https_proxy, all_proxy and no_proxy must be usable"
    try:
        yield
    except ImportError as error:  # of a SOCKS proxy
        raise ServerError(f"{rule}, got {error}") from None
    except (ValueError, httpx.InvalidURL):
        raise ServerError(f"{rule}, got one that is no URL like http://USER:PASSWORD@HOST:PORT") from None
