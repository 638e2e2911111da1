"""The URL of a catalog. It may have a password in it, so the messages here show no more than its scheme."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

_SCHEMES = ("postgresql://", "postgres://")


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Where a catalog's replica is, and how old the states may be that queries read there."""

    url: str = field(repr=False)
    max_staleness_ms: int


def check_catalog_url(url: str, setting: str) -> None:
    """ValueError, which names ``setting``, if the URL can't be that of a database in PostgreSQL."""
    if not url.startswith(_SCHEMES):
        scheme = re.match(r"[\w+.-]+(?=://)", url)
        got = f"{scheme[0]}://…" if scheme else "something else"
        raise ValueError(f"{setting} must start with postgresql://, got {got}")
    try:
        parts = urlsplit(url)
        options = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        usable = len(parts.path) > 1 and parts.port != 0 and "@" not in parts.path + parts.fragment
    except ValueError:
        options, usable = set(), False
    for name in {"password", "sslpassword"} & options:  # messages show the options
        raise ValueError(f"{setting} must be without the option {name}; use libpq's password file (PGPASSFILE)")
    if not usable:
        raise ValueError(
            f"{setting} must be like postgresql://USER@HOST:5432/DATABASE, with options of libpq after a ?, and with "
            "%2F for / in a password (%3F for ?, %23 for #), got something else"
        )
