"""The demo's child processes: started with a log each, waited for, and stopped whatever happens."""

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
    """A child process ended or didn't get ready. The message names its log and shows the last lines of it."""


@dataclass(frozen=True, slots=True)
class Service:
    """One child process, the leader of a process group of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def failure(self, what: str) -> ServiceFailure:
        tail = self.log.read_text("utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        return ServiceFailure("\n".join([f"the {self.name} {what}; the end of {self.log}:", *tail]))


class Services:
    """A context manager that stops, in reverse order, every process started in it and all of their children.

    In a main thread it also turns SIGTERM into SystemExit, so that a terminated owner cleans up too.
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
        """`python -m MODULE ARGUMENTS…` in this Python, `regrad` where none is named; its output in <name>.log."""
        log = self._log_folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches us alone; we end them in order
            )
        service = Service(name, process, log)
        self._services.append(service)
        return service


def waiting(service: Service, ready: Callable[[], str | None], timeout_seconds: float) -> str:
    """Polls ``ready`` until it returns something, with a clock on screen.

    ServiceFailure where the process ends or the time is up first.
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
    """Ends the process as its owner would, then whatever is left of its group."""
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
        return  # nothing was left


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def free_port() -> int:
    """A TCP port that was free a moment ago, chosen by the kernel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
