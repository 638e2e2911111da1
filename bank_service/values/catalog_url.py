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


def netloc_of(url: str) -> str:
    """The part between ``//`` and the path. ``urlsplit`` refuses a list with an IPv6 address in newer Pythons."""
    found = re.match(r"[\w+.-]+://([^/?#]*)", url)
    return found[1] if found else ""


def without_password(url: str) -> str:
    netloc = netloc_of(url)
    user, at, hosts = netloc.rpartition("@")
    return url.replace(netloc, user.partition(":")[0] + at + hosts, 1)


def hosts_of(url: str) -> list[tuple[str, int | None]]:
    """Each host before the database's name, with its port. ValueError for a port that is no number."""
    places = netloc_of(url).rpartition("@")[2].split(",")
    hosts = [urlsplit(f"//{place}") for place in places]
    return [(host.hostname or "", host.port) for host in hosts]


def check_catalog_url(url: str, setting: str) -> None:
    """ValueError, which names ``setting``, if the URL can't be that of a database in PostgreSQL."""
    if not url.startswith(_SCHEMES):
        scheme = re.match(r"[\w+.-]+(?=://)", url)
        got = f"{scheme[0]}://…" if scheme else "something else"
        raise ValueError(f"{setting} must start with postgresql://, got {got}")
    try:
        parts = urlsplit(url.replace(netloc_of(url), "", 1))
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        hosts = hosts_of(url)
        has_ports = all(port != 0 for _, port in hosts)
        usable = len(parts.path) > 1 and has_ports and "@" not in parts.path + parts.fragment
    except ValueError:
        options, hosts, usable = {}, [], False
    for name in {"password", "sslpassword"} & options.keys():  # messages show the options
        raise ValueError(f"{setting} must be without the option {name}; use libpq's password file (PGPASSFILE)")
    if not usable:
        raise ValueError(
            f"{setting} must be like postgresql://USER@HOST:5432/DATABASE, with options of libpq after a ?, and with "
            "%2F for / in a password (%3F for ?, %23 for #), got something else"
        )
    if (len(hosts) > 1 or "," in options.get("host", "")) and "target_session_attrs" not in options:
        raise ValueError(
            f"{setting} must have the option target_session_attrs where it names several hosts: read-write for the one "
            "that takes writes, standby for a replica"
        )
