"""Types of command-line arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from urllib.parse import urlsplit


def whole(least: int, greatest: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number from ``least`` to ``greatest``. None: no upper limit."""
    rule = f"of at least {least}" if greatest is None else f"in {least}..{greatest}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (greatest is not None and value > greatest):
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return value

    return parse


def server_url(text: str) -> str:
    """An argument's type: the URL of an OpenAI-compatible server, http://host:port. Its end "/v1" is dropped."""
    if "@" in text:
        raise argparse.ArgumentTypeError("must be http://host:port without a user or a password, got one with an @")
    url = text.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"must be http://host:port, got {text!r}")
    return url
