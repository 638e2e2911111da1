"""A real nginx with deploy/router/nginx.conf, on ports of its own. It skips the test where there is none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from regrad_vllm.local.processes import free_port
from tests.house.pages import ROOT

FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # of temporary files
START_SECONDS = 20.0


@contextmanager
def routing(folder: Path, first: int, second: int) -> Iterator[str]:
    """The URL of a router before two servers, which listen at these ports of the loopback."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not on the PATH; .ci/programs installs it (Debian: apt-get install nginx-light)")
    port = free_port()
    text = (ROOT / "deploy" / "router" / "nginx.conf").read_text("utf-8")
    own = "".join(f"{name}_temp_path {folder / name};\n" for name in FOLDERS) + "access_log off;\n"
    for before, after in (
        ("server-1:8000", f"127.0.0.1:{first}"),
        ("server-2:8000", f"127.0.0.1:{second}"),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("http {", "http {\n" + own),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    (folder / "nginx.conf").write_text(text)
    settings = f"daemon off; pid {folder}/pid; error_log stderr;" + (" user root;" if os.getuid() == 0 else "")
    command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", settings]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < deadline, "nginx must start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0
