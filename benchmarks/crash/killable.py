"""Bank processes that can be killed, on one folder after another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from bank_service.runtime.data_dir import ADDRESS_FILE, BankAddress, read_address
from benchmarks.crash.faults import Fault

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
END_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Process:
    """A running bank."""

    handle: psutil.Process
    address: BankAddress
    children: list[psutil.Process]  # its Redis server

    def arm(self) -> None:
        """Makes its fault active."""
        self.handle.send_signal(signal.SIGUSR1)

    def wait(self, seconds: float) -> bool:
        """Whether it ends by itself within ``seconds``."""
        return has_ended(self.handle, seconds)


def end(handle: psutil.Process) -> None:
    """Kills a process with SIGKILL."""
    with contextlib.suppress(psutil.NoSuchProcess):
        handle.send_signal(signal.SIGKILL)
    has_ended(handle, END_SECONDS)


def has_ended(handle: psutil.Process, seconds: float, *, is_zombie_enough: bool = False) -> bool:
    """Whether a process ends within ``seconds``. A zombie may still have threads and the locks of its files."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if handle.status() == psutil.STATUS_ZOMBIE and is_zombie_enough:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)


class Nursery:
    """Forks banks from a process that has imported everything and started nothing."""

    def __init__(self, log: Path, catalog: str | None = None, objects: str | None = None) -> None:
        """``catalog``: the URL of the database that all banks have their catalog in; None: SQLite in their folders.
        ``objects``: that of the object store with their gradients; None: they lie in the folders."""
        self._log = log
        self.catalog = catalog
        self.objects = objects
        self._started: list[psutil.Process] = []
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.crash.nursery"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._started:
            end(process)
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.close()
        self._popen.wait(20)
        self._popen.stdout.close()

    def fork(self, data_dir: Path, fault: Fault | None = None, plant: str | None = None) -> psutil.Process:
        """Starts a bank and doesn't wait for it. Its fault is inactive until ``arm``."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        asked = None if fault is None else {"point": fault.point, "passes": fault.passes}
        order = {
            "data_dir": str(data_dir), "catalog": self.catalog, "objects": self.objects, "log": str(self._log),
            "fault": asked, "plant": plant,
        }  # fmt: skip
        self._popen.stdin.write(json.dumps(order) + "\n")
        self._popen.stdin.flush()
        handle = psutil.Process(int(self._popen.stdout.readline()))
        self._started = [process for process in self._started if process.is_running()]
        self._started.append(handle)
        return handle

    def start(self, data_dir: Path, fault: Fault | None = None, plant: str | None = None) -> Process:
        """Starts a bank and waits for its answer. RuntimeError, with the end of its log, if it doesn't start."""
        handle = self.fork(data_dir, fault, plant)
        deadline = time.monotonic() + START_SECONDS
        while not _is_announced(data_dir, handle.pid):
            if not handle.is_running() or time.monotonic() > deadline:
                raise RuntimeError(f"the bank must start, got: {self._log.read_text()[-3000:]}")
            time.sleep(0.01)
        address = read_address(data_dir)
        assert address is not None
        return Process(handle, address, handle.children(recursive=True))


def _is_announced(data_dir: Path, pid: int) -> bool:
    try:
        return bool(json.loads((data_dir / ADDRESS_FILE).read_text())["pid"] == pid)
    except FileNotFoundError:
        return False
