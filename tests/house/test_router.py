"""deploy/router/nginx.conf: a real nginx before two servers that say their names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.house.nginx import routing

ROUTES = [f"team-{number}" for number in range(100)]


class Named(ThreadingHTTPServer):
    """A server that answers each request with its name, in two parts: the second when ``go_on`` is set."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.name = name
        self.go_on = threading.Event()
        self.go_on.set()
        threading.Thread(target=self.serve_forever).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    server: Named

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.name.encode())
        self.server.go_on.wait(30)
        self.wfile.write(b"!")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def servers() -> Iterator[list[Named]]:
    made = [Named("one"), Named("two")]
    yield made
    for server in made:
        server.stop()


@pytest.fixture
def router(servers: list[Named], tmp_path: Path) -> Iterator[httpx.Client]:
    with (
        routing(tmp_path, servers[0].server_port, servers[1].server_port) as url,
        httpx.Client(base_url=url, timeout=20, trust_env=False) as client,
    ):
        yield client


def asked(client: httpx.Client, route: str | None) -> str:
    answer = client.post("/v1/chat/completions", json={}, headers={"x-regrad-route": route} if route else {})
    assert answer.status_code == 200
    return answer.text


def where(client: httpx.Client) -> dict[str, str]:
    return {route: asked(client, route) for route in ROUTES}


def test_a_route_stays_at_its_server_and_both_servers_have_routes(router: httpx.Client) -> None:
    first = where(router)
    assert where(router) == first
    shares = [list(first.values()).count(name) for name in ("one!", "two!")]
    assert sum(shares) == len(ROUTES) and min(shares) > len(ROUTES) / 4


def test_requests_without_a_route_go_to_both(router: httpx.Client) -> None:
    assert {asked(router, None) for _ in range(50)} == {"one!", "two!"}


def test_the_routes_of_a_server_that_is_gone_move_and_the_others_stay(
    router: httpx.Client, servers: list[Named]
) -> None:
    before = where(router)
    servers[0].stop()
    after = where(router)
    assert set(after.values()) == {"two!"} and "one!" in before.values()


def test_the_parts_of_a_stream_come_when_they_are_made(router: httpx.Client, servers: list[Named]) -> None:
    release: list[Callable[[], None]] = [server.go_on.set for server in servers]
    for server in servers:
        server.go_on.clear()
    with router.stream("POST", "/v1/chat/completions", json={}) as answer:
        parts = answer.iter_text()
        assert next(parts) in ("one", "two"), "the end isn't there yet"
        for go_on in release:
            go_on()
        assert next(parts) == "!"
