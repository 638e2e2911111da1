"""The folders of arenas. A server keeps its own locked while it runs. The next start removes those of dead servers."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_PREFIX = "regrad-arena-"
_LOCK_NAME = "owner.lock"


def default_root() -> Path:
    """The folder of shared memory, or the folder for temporary files on a system without one."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def free_bytes(root: Path, *, sweep: bool = True) -> int:
    """The free bytes of the file system of ``root``. OSError.

    sweep: makes the folder if it isn't there, and removes the folders of dead owners first. Else nothing is written.
    """
    if sweep:
        root.mkdir(parents=True, exist_ok=True)
        with _sweep_lock(root):
            _sweep(root)
    found = os.statvfs(next(folder for folder in (root, *root.absolute().parents) if folder.is_dir()))
    return found.f_bavail * found.f_frsize


def make_folder(root: Path) -> tuple[Path, int]:
    """A new folder under ``root`` and its lock, an open file. It first removes the folders of dead owners. OSError."""
    root.mkdir(parents=True, exist_ok=True)
    with _sweep_lock(root):
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=root))
        lock_file = os.open(folder / _LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder, lock_file


def _sweep(root: Path) -> None:
    """Removes this user's arenas of dead owners under ``root``."""
    for folder in sorted(root.glob(FOLDER_PREFIX + "*")):
        if folder.lstat().st_uid != os.getuid():  # another user's, which has another sweep lock; only root can open it
            continue
        try:
            lock_file = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # its owner died before it could lock the folder
            shutil.rmtree(folder, ignore_errors=True)
            continue
        except OSError:
            continue
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner is alive
        finally:
            os.close(lock_file)


@contextmanager
def _sweep_lock(root: Path) -> Iterator[None]:
    """Lets one process of a user at a time make or sweep arenas. So no process sweeps a folder that isn't locked yet.

    Each user has a lock, because all users share /dev/shm. A symbolic link is not followed, because another user may
    have made it.
    """
    flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    lock_file = os.open(root / f".regrad-arena.{os.getuid()}.sweep", flags, 0o600)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock_file)
