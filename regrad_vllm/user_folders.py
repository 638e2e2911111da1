"""Folders of the user who runs a command."""

from __future__ import annotations

import os
from pathlib import Path


class NoHomeError(RuntimeError):
    """The user has no home folder, as in a container that runs under a number alone."""


def user_folder(variable: str, below_home: str) -> Path:
    """The folder that the environment names, else one below the user's home. NoHomeError without both."""
    named = os.environ.get(variable)
    try:
        return Path(named or f"~/{below_home}").expanduser()
    except RuntimeError:
        raise NoHomeError(f"HOME or {variable} must be set, because this user has no home folder") from None
