"""deploy/router/nginx.conf: a real nginx before two servers that say their names."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from regrad_vllm.local.processes import free_port
from tests.house.pages import ROOT

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
ROUTES = [f"team-{number}" for number in range(100)]
FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # of temporary files


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
    if NGINX is None:
        pytest.skip("nginx is not on the PATH; .ci/programs installs it (Debian: apt-get install nginx-light)")
    port = free_port()
    text = (ROOT / "deploy" / "router" / "nginx.conf").read_text("utf-8")
    own = "".join(f"{name}_temp_path {tmp_path / name};\n" for name in FOLDERS) + "access_log off;\n"
    for before, after in (
        ("server-1:8000", f"127.0.0.1:{servers[0].server_port}"),
        ("server-2:8000", f"127.0.0.1:{servers[1].server_port}"),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("http {", "http {\n" + own),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    (tmp_path / "nginx.conf").write_text(text)
    globals_ = f"daemon off; pid {tmp_path}/pid; error_log stderr;" + (" user root;" if os.getuid() == 0 else "")
    command = [NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr", "-g", globals_]
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            while not _answers(client):
                assert process.poll() is None, "nginx ended"
                time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait(20)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.post("/").status_code == 200
    except httpx.TransportError:
        return False


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
