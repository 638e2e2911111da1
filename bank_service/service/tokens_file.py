"""The file of --tokens-file, in TOML. It has the tokens' digests and permissions, and limits of single namespaces:

    tokens."ci" = { sha256 = "9f86…", scopes = ["read", "write"], namespaces = ["team-a"] }
    limits."team-a" = { max_documents = 10000, max_bytes = 1000000000, max_requests = 16 }

A token has 256 random bits, so one round of SHA-256 protects it as well as a slow hash.

The bank reads the file again when it has changed. At the start, an unusable file is an error. Later the bank keeps the
last usable tokens and logs an error. So a mistake in the file neither opens the bank to all nor stops it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bank_service.errors import InvalidArgumentError
from bank_service.service.access import ALL_NAMESPACES, Grant, Scope
from bank_service.service.private_file import check_private
from bank_service.values.documents import check_namespace
from bank_service.values.namespace_limits import NamespaceLimits

logger = logging.getLogger(__name__)

PREFIX = "regrad_"  # scanners for leaked secrets find a token by it
_SECRET = re.compile(rf"{PREFIX}[\w-]{{43}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN_KEYS = {"sha256", "scopes", "namespaces"}


@dataclass(frozen=True, slots=True)
class _Contents:
    grants: Mapping[bytes, Grant]  # by the digest of the secret
    limits: Mapping[str, Mapping[str, int]]  # namespace → its limits in the file


class TokensFile:
    """The present grants and limits of a file. Safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        """Reads the file. OSError or ValueError if it can't be used."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._contents = _read(path)

    def find(self, secret: str) -> Grant | None:
        """The permissions of a token; None for an unknown one. It compares all digests, each in constant time."""
        digest = hashlib.sha256(secret.encode()).digest()
        found = None
        for known, grant in self._current().grants.items():
            if hmac.compare_digest(known, digest):
                found = grant
        return found

    def limits(self, namespace: str, defaults: NamespaceLimits) -> NamespaceLimits:
        """The limits of a namespace: those in the file, and ``defaults`` for the rest."""
        own = self._current().limits.get(namespace)
        if not own:
            return defaults
        return NamespaceLimits(
            **{item.name: own.get(item.name, getattr(defaults, item.name)) for item in fields(defaults)}
        )

    def _current(self) -> _Contents:
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                try:
                    self._contents = _read(self._path)
                except OSError as error:  # the error may pass: the next call reads the file again
                    logger.error("%s; the bank goes on with the tokens that it had read before", error)
                except ValueError as error:
                    self._stamp = stamp
                    logger.error("%s; the bank goes on with the tokens that it had read before", error)
                else:
                    self._stamp = stamp
                    logger.info("read %s again: %d tokens", self._path, len(self._contents.grants))
            return self._contents

    def _stamp_now(self) -> tuple[int, ...] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def new_token(name: str, scopes: Sequence[str], namespaces: Sequence[str]) -> tuple[str, str]:
    """Makes a token: (its secret, its line for the file). ValueError for an invalid scope or namespace."""
    secret = PREFIX + secrets.token_urlsafe(32)
    entry = {
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "scopes": list(scopes),
        "namespaces": list(namespaces),
    }
    _grant(name, entry)
    # A JSON string or list of strings is also valid TOML.
    pairs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in entry.items())
    return secret, f"tokens.{json.dumps(name)} = {{ {pairs} }}"


def _read(path: Path) -> _Contents:
    check_private(path, "tokens_file")
    try:
        parsed = tomllib.loads(path.read_text("utf-8"))
        unknown = {_SECRET.sub("a token", name) for name in set(parsed) - {"tokens", "limits"}}
        if unknown:
            raise ValueError(f"the only tables must be tokens and limits, got {', '.join(sorted(unknown))}")
        grants: dict[bytes, Grant] = {}
        for name, entry in _table(parsed, "tokens").items():
            grant = _grant(name, entry)
            digest = bytes.fromhex(entry["sha256"])
            if digest in grants:
                raise ValueError(f"tokens.{name} must have a sha256 of its own, got that of {grants[digest].name}")
            grants[digest] = grant
        return _Contents(grants, {name: _limits(name, entry) for name, entry in _table(parsed, "limits").items()})
    except ValueError as error:  # covers errors of TOML and of UTF-8
        raise ValueError(f"tokens_file {path} can't be used: {error}") from None


def _table(parsed: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = parsed.get(name, {})
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError(f"{name} must be a table of tables")
    return table


def _grant(name: str, entry: Mapping[str, Any]) -> Grant:
    # The messages show no values, because somebody may have written a secret in the digest's place.
    if not name.isprintable() or not 1 <= len(name) <= 64:
        raise ValueError("a token's name must have 1..64 printable characters")
    if _SECRET.fullmatch(name):
        raise ValueError("a token's name must not be a token itself: names are told in errors")
    if set(entry) != _TOKEN_KEYS:
        raise ValueError(f"tokens.{name} must have {', '.join(sorted(_TOKEN_KEYS))} and nothing else")
    if not isinstance(entry["sha256"], str) or not _DIGEST.fullmatch(entry["sha256"]):
        raise ValueError(f"tokens.{name}.sha256 must be 64 lower-case hex digits; `regrad token` makes them")
    known = [scope.value for scope in Scope]
    for key in ("scopes", "namespaces"):
        if not isinstance(entry[key], list) or not entry[key] or not all(isinstance(item, str) for item in entry[key]):
            raise ValueError(f"tokens.{name}.{key} must be a list of at least one string")
    if set(entry["scopes"]) - set(known):
        raise ValueError(f"tokens.{name}.scopes must be some of {', '.join(known)}")
    namespaces = frozenset(entry["namespaces"])
    for namespace in namespaces - {ALL_NAMESPACES}:
        _check_namespace(namespace, f"tokens.{name}.namespaces")
    return Grant(name, frozenset(Scope(scope) for scope in entry["scopes"]), namespaces)


def _limits(namespace: str, entry: Mapping[str, Any]) -> dict[str, int]:
    _check_namespace(namespace, "limits")
    known = [item.name for item in fields(NamespaceLimits)]
    if set(entry) - set(known):
        raise ValueError(f"limits.{namespace} must have some of {', '.join(known)}, got {', '.join(sorted(entry))}")
    for key, value in entry.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"limits.{namespace}.{key} must be a whole number, 0 for no limit, got {value!r}")
    return dict(entry)


def _check_namespace(name: str, field: str) -> None:
    try:
        check_namespace(name, field)
    except InvalidArgumentError as error:
        raise ValueError(error.message) from None
    if not name:
        raise ValueError(f"{field} must not have an empty name; 'default' is the default namespace")
