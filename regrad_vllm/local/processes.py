"""Child processes: each is started with a log of its own, and all are stopped in the end, also after an error."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

_TAIL_LINES = 15
_GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.5


class ServiceFailure(RuntimeError):
    """A child process ended or didn't become ready. The message names its log and shows the log's last lines."""


@dataclass(frozen=True, slots=True)
class Service:
    """One child process. It leads its own process group."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def failure(self, what: str) -> ServiceFailure:
        tail = self.log.read_text("utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        return ServiceFailure("\n".join([f"the {self.name} {what}; the end of {self.log}:", *tail]))


class Services:
    """A context manager that stops all processes started in it, in reverse order, with their children.

    In the main thread it also turns SIGTERM into SystemExit, so that it cleans up after SIGTERM too.
    """

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._services: list[Service] = []
        self._earlier_handler: Any = None

    def __enter__(self) -> Services:
        if threading.current_thread() is threading.main_thread():
            self._earlier_handler = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for service in reversed(self._services):
            stop(service)
        if self._earlier_handler is not None:
            signal.signal(signal.SIGTERM, self._earlier_handler)

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        module: str = "regrad_vllm.cli",
    ) -> Service:
        """Starts `python -m MODULE ARGUMENTS…` with this Python. Its output goes into <name>.log."""
        log = self._log_folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # so Ctrl-C reaches only this process, which stops the others in order
            )
        service = Service(name, process, log)
        self._services.append(service)
        return service


def waiting(service: Service, ready: Callable[[], str | None], timeout_seconds: float) -> str:
    """Polls ``ready`` until it doesn't return None, and returns its value. A clock shows on the terminal.

    ServiceFailure if the process ends or the time is up before.
    """
    from tqdm import tqdm

    begun = time.monotonic()
    with tqdm(desc=f"waiting for the {service.name}", bar_format="{desc} {elapsed}") as clock:
        while True:
            found = ready()
            if found is not None:
                return found
            if service.process.poll() is not None:
                raise service.failure(f"ended with status {service.process.returncode} before it was ready")
            if time.monotonic() - begun > timeout_seconds:
                raise service.failure(f"wasn't ready after {timeout_seconds:.0f} s")
            clock.refresh()
            time.sleep(_POLL_SECONDS)


def stop(service: Service) -> None:
    """Asks the process to end, then kills the rest of its process group."""
    if service.process.poll() is None:
        service.process.terminate()
        try:
            service.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            service.process.kill()
            service.process.wait()
    try:
        os.killpg(service.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the group is empty


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def free_port() -> int:
    """A TCP port that was free a moment ago, chosen by the kernel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
