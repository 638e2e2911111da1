"""The URL of Redis servers. It may have a password in it, so the messages here show no more than its scheme."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

_SCHEMES = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://", "redis+sentinel://",
            "rediss+sentinel://")  # fmt: skip
_SENTINEL_OPTION = "sentinel_"  # begins the options of a URL that are for the Sentinels


class RedisKind(enum.Enum):
    """How to find the server of a key."""

    ONE = enum.auto()
    CLUSTER = enum.auto()
    SENTINEL = enum.auto()


_PORTS = {RedisKind.CLUSTER: 6379, RedisKind.SENTINEL: 26379}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The parts of a URL."""

    kind: RedisKind
    base: str = field(repr=False)  # a URL for redis-py, of the first address
    addresses: tuple[tuple[str, int], ...] = ()  # host and port of each server or Sentinel that the URL names
    service: str = ""  # the name that the Sentinels know
    sentinel_options: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # name and password for Sentinels

    @classmethod
    def parse(cls, url: str, setting: str) -> RedisUrl:
        """ValueError, which names ``setting``, if the URL can't be that of Redis servers."""
        if not url.startswith(_SCHEMES):
            scheme = re.match(r"[\w+.-]+(?=://)", url)
            got = f"{scheme[0]}://…" if scheme else "something else"
            raise ValueError(
                f"{setting} must start with redis://, rediss:// or unix://, or with redis+cluster:// or "
                f"redis+sentinel:// and their rediss, got {got}"
            )
        scheme_name, _, kind = url.partition("://")[0].partition("+")
        try:
            parsed = cls._several(url, scheme_name, RedisKind[kind.upper()]) if kind else cls._one(url)
        except ValueError:
            parsed = None
        if parsed is None:
            raise ValueError(unusable(setting))
        return parsed

    @classmethod
    def _one(cls, url: str) -> RedisUrl | None:
        if url.startswith("unix://"):
            return cls(RedisKind.ONE, url)
        parts = urlsplit(url)
        is_usable = bool(parts.hostname) and parts.port != 0 and "@" not in parts.path + parts.fragment
        return cls(RedisKind.ONE, url) if is_usable else None

    @classmethod
    def _several(cls, url: str, scheme: str, kind: RedisKind) -> RedisUrl | None:
        """Of ``scheme+kind://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DATABASE``; service and database for Sentinels
        only."""
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        addresses = []
        for host in hosts.split(","):
            split = urlsplit(f"redis://{host}")
            if not split.hostname or split.port == 0 or split.path:
                return None
            addresses.append((split.hostname, split.port or _PORTS[kind]))
        service, _, database = parts.path.strip("/").partition("/")
        if "@" in user + parts.path + parts.fragment or (kind is RedisKind.SENTINEL) != bool(service):
            return None
        if service.isdigit():  # a database in the place of the service
            return None
        options = parse_qsl(parts.query, keep_blank_values=True)
        own = [(name, value) for name, value in options if not name.startswith(_SENTINEL_OPTION)]
        others = [(name.removeprefix(_SENTINEL_OPTION), value) for name, value in options if (name, value) not in own]
        if kind is RedisKind.CLUSTER and others:
            return None
        first = hosts.split(",")[0]
        base = f"{scheme}://{user}{at}{first}/{database}" + (f"?{urlencode(own)}" if own else "")
        return cls(kind, base, tuple(addresses), service, tuple(others))


def check_redis_url(url: str, setting: str) -> None:
    """ValueError, which names ``setting``, if the URL can't be that of Redis servers."""
    RedisUrl.parse(url, setting)


def unusable(setting: str) -> str:
    """The message for a URL whose parts can't be told from each other."""
    return (
        f"{setting} must be like redis://:PASSWORD@HOST:6379/0, redis+cluster://:PASSWORD@HOST:6379,HOST:6379 or "
        "redis+sentinel://:PASSWORD@HOST:26379,HOST:26379/SERVICE, with options of redis-py alone after a ?, and with "
        "%2F for / in the password (%3F for ?, %23 for #), got something else"
    )
