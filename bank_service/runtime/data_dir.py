"""The folder of one bank. One process owns it at a time, and writes its address there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from bank_service.errors import BankInUseError
from bank_service.wire.ports import target_of

ADDRESS_FILE = "address.json"


@dataclass(frozen=True, slots=True)
class BankAddress:
    """The address of a running bank."""

    host: str
    port: int
    metrics_port: int | None  # None: no metrics endpoint

    @property
    def target(self) -> str:
        """For a gRPC channel."""
        return target_of(self.host, self.port)


class DataDir:
    """Implements ``Ownership`` by a lock on a file of the folder. The kernel unlocks it when the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Creates the folder if needed and locks it. BankInUseError if another bank has it, OSError if it can't be
        written."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path} must be a folder that this user can write, got {error.strerror}; "
                "mend that or use another data directory",
            ) from error
        try:
            self._lock_file(lock)
        except BankInUseError:
            lock.close()
            raise
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        (self.path / ADDRESS_FILE).unlink(missing_ok=True)  # a killed bank may have left it

    def check_free(self) -> None:
        """BankInUseError if another bank has the folder. Creates nothing. It takes the lock for a moment."""
        try:
            lock = (self.path / "lock").open("r+")
        except OSError:
            return  # no bank has used the folder, or ``take`` will raise the error
        with lock:
            self._lock_file(lock)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps banks out meanwhile, and writes nothing but the lock, where there is none. BankInUseError if one runs.
        A folder that this user can't write and that has no lock stays open to banks of others."""
        path = self.path / "lock"
        with ExitStack() as stack:
            with suppress(OSError):
                path.touch(exist_ok=False)
            if path.exists():
                lock = stack.enter_context(path.open())
                self._lock_file(lock, fcntl.LOCK_SH)  # several may read; a lock to write needs a file open for writing
            yield

    def _lock_file(self, lock: IO[str], kind: int = fcntl.LOCK_EX) -> None:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise BankInUseError(
                f"{self.path} must belong to one bank, got one running already (pid {owner}); "
                "stop it or use another data directory"
            ) from None

    def announce(self, address: BankAddress) -> None:
        """Writes the address file, once the bank is ready. ``release`` removes it."""
        temporary = self.path / (ADDRESS_FILE + ".new")
        temporary.write_text(json.dumps({**asdict(address), "pid": os.getpid()}) + "\n")
        os.replace(temporary, self.path / ADDRESS_FILE)

    def release(self) -> None:
        if self._lock is not None:
            (self.path / ADDRESS_FILE).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def read_address(data_dir: Path) -> BankAddress | None:
    """The address of the bank that runs on ``data_dir``; None where none has announced itself."""
    try:
        fields = json.loads((data_dir / ADDRESS_FILE).read_text())
    except FileNotFoundError:
        return None
    return BankAddress(fields["host"], fields["port"], fields["metrics_port"])
