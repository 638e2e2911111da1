"""Commands that ask a running server: its key, its URL, proxies, and a server that is away or refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from regrad_vllm.cli import main
from regrad_vllm.http_client import connect
from regrad_vllm.local.processes import free_port

KEY = "the-key"
COMMANDS = {"eval": ["eval"], "bench": ["bench", "load"]}


class Guarded(BaseHTTPRequestHandler):
    """Names one model to whoever has the key, as `vllm serve --api-key` does."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {KEY}"
        status = 401 if not known else 200 if self.path == "/v1/models" else 404
        said = json.dumps({"data": [{"id": "theirs"}]}) if status == 200 else "no key"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command, in an environment without a key and with proxies that nobody can use."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("all_proxy", "socks5://127.0.0.1:9")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", "::1/128")
    return COMMANDS[request.param]


def said(command: list[str], server: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    assert main([*command, "--server", server, "--bank", "127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix(f"regrad {command[0]}: ")


def test_a_server_that_refuses_is_one_line_that_names_the_variable_of_the_key(
    command: list[str], server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = f"{server}/v1/models must answer, got 401: no key; set OPENAI_API_KEY to the server's --api-key"
    assert said(command, server, capsys) == refusal
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert said(command, f"{server}/v1/", capsys) == refusal
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    known = f"--model-name must be one that {server} serves (theirs), got 'base'"
    assert said(command, server, capsys) == said(command, f"{server}/v1", capsys) == known


def test_a_server_that_is_away_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"http://localhost:{free_port()}"
    line = said(command, nowhere, capsys)
    assert line.startswith(f"{nowhere}/v1/models must answer, got ") and line.endswith("is the server running?")


def test_proxies_that_cannot_be_used_are_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = said(command, "http://example.com", capsys)  # nothing is sent
    assert line.startswith("http_proxy, https_proxy, all_proxy and no_proxy must be usable, got ")


def test_a_password_of_a_proxy_is_not_shown(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("all_proxy")
    monkeypatch.setenv("http_proxy", "http://user:hunter2")
    line = said(command, "http://example.com", capsys)  # nothing is sent
    assert line.startswith("http_proxy, https_proxy, all_proxy and no_proxy must be usable") and "hunter2" not in line


def test_a_key_may_end_with_a_new_line_and_one_that_no_header_can_have_is_not_shown(
    command: list[str], server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert said(command, server, capsys).startswith("--model-name must be one")
    for key in ("schlüssel", "two\nlines"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        line = said(command, server, capsys)
        assert line.startswith("OPENAI_API_KEY must be printable ASCII, got ") and key[:3] not in line
        with pytest.raises(ValueError, match="OPENAI_API_KEY must be printable ASCII"):
            connect(server, 1.0)


@pytest.mark.parametrize("url", ["http://user:s3cret@host", "http://user:s3/cret@host", "user:s3cret@host"])
def test_a_url_with_a_password_is_refused_and_not_shown(
    url: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--server", url, "--bank", "127.0.0.1:1"])
    line = capsys.readouterr().err
    assert "argument --server: must be http://host:port without a user or a password" in line and "s3" not in line


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://localhost:port", "/v1"])
def test_what_is_no_url_is_refused(url: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--server", url, "--bank", "127.0.0.1:1"])
    assert f"argument --server: must be http://host:port, got {url!r}" in capsys.readouterr().err
