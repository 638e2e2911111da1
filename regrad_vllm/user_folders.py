"""Folders of the user who runs a command."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class NoHomeError(RuntimeError):
    """The user has no home folder, as in a container that runs under a number alone."""


def user_folder(variable: str, below_home: str) -> Path:
    """The folder that the environment names, else one below the user's home. NoHomeError without both."""
    named = os.environ.get(variable)
    folder: Path | None = None
    with suppress(RuntimeError):
        folder = Path(named or f"~/{below_home}").expanduser()
    # Containers set HOME to / for a user without a home. Only root can write there.
    if folder is None or (not named and folder == Path("/", below_home) and os.getuid() != 0):
        raise NoHomeError(f"HOME or {variable} must be set, because this user has no home folder")
    return folder
