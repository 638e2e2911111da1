"""Bad weather in front of an object store."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.servers.object_servers import ObjectServer


@dataclass(slots=True)
class Weather:
    """What happens to the next requests before they reach the store."""

    num_refused: int = 0  # so many are refused
    refusal: tuple[int, str] = (503, "SlowDown")  # status and S3's code
    delay_seconds: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and SHA-256 that S3 shall compare, of each


@contextmanager
def weathered(server: ObjectServer) -> Iterator[tuple[ObjectServer, Weather]]:
    """A proxy in front of a store."""
    weather = Weather()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            weather.requests.append((self.command, self.headers.get("x-amz-checksum-sha256", "")))
            time.sleep(weather.delay_seconds)
            if weather.num_refused > 0:
                weather.num_refused -= 1
                status, code = weather.refusal
                self.reply(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
                return
            connection = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=30)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                answer = connection.getresponse()
                self.reply(answer.status, dict(answer.getheaders()), answer.read())
            finally:
                connection.close()

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Proxy(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that waits no longer has closed its connection

    proxy = Proxy(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield ObjectServer(f"http://127.0.0.1:{proxy.server_address[1]}", server.pid), weather
    finally:
        weather.delay_seconds = 0.0
        proxy.shutdown()
        proxy.server_close()
        thread.join()
