"""The URL of a Redis server. It may have a password in it, so the messages here show no more than its scheme."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_SCHEMES = ("redis://", "rediss://", "unix://")


def check_redis_url(url: str, setting: str) -> None:
    """ValueError, which names ``setting``, if the URL can't be that of a Redis server."""
    if not url.startswith(_SCHEMES):
        scheme = re.match(r"[\w+.-]+(?=://)", url)
        got = f"{scheme[0]}://…" if scheme else "something else"
        raise ValueError(f"{setting} must start with redis://, rediss:// or unix://, got {got}")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and "@" not in parts.path + parts.fragment
    except ValueError:
        usable = False
    if not usable and not url.startswith("unix://"):
        raise ValueError(unusable(setting))


def unusable(setting: str) -> str:
    """The message for a URL whose parts can't be told from each other."""
    return (
        f"{setting} must be like redis://:PASSWORD@HOST:6379/0, with options of redis-py alone after a ?, and with "
        "%2F for / in the password (%3F for ?, %23 for #), got something else"
    )
