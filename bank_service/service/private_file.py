"""Checks files with secrets. Other users of the machine must not be able to read or change them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def check_private(path: Path, setting: str) -> None:
    """OSError if there is no such file. ValueError if every user of the machine may read or write it."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise OSError(f"{setting} must be a readable file, got {path}: {error.strerror}") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ValueError(
            f"{setting} must not be open to everybody, got {path} with mode {stat.S_IMODE(mode):03o}; "
            f"run chmod 600 {path}"
        )
