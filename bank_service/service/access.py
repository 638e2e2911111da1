"""Permissions: scopes on namespaces. The servicer checks each request here before it does any work for it.

A refusal is the same whether the namespace exists or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from bank_service.errors import PermissionDeniedError, UnauthenticatedError
from bank_service.wire.limits import DEFAULT_NAMESPACE, MAX_NAMESPACE_CHARS

ALL_NAMESPACES = "*"
_SCHEME = "bearer "


class Scope(Enum):
    """A permission of a token in its namespaces. ADMIN includes the others."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Grant:
    """The permissions of one token."""

    name: str
    scopes: frozenset[Scope]
    namespaces: frozenset[str]  # exact names, or ALL_NAMESPACES

    def allows(self, scope: Scope, namespace: str) -> bool:
        has_scope = scope in self.scopes or Scope.ADMIN in self.scopes
        return has_scope and (ALL_NAMESPACES in self.namespaces or namespace in self.namespaces)

    @property
    def sees_everything(self) -> bool:
        """Whether the token is admin of all namespaces. Then it may also see data of no namespace, such as the cache's
        figures."""
        return Scope.ADMIN in self.scopes and ALL_NAMESPACES in self.namespaces


class Grants(Protocol):
    """The contract of a store of tokens and their permissions."""

    def find(self, secret: str) -> Grant | None:
        """The present permissions of the token with this secret; None for an unknown token."""


class Caller:
    """The permissions of one call. They are read again for each request, so a removed token ends its streams."""

    def __init__(self, find: Callable[[], Grant | None]) -> None:
        self._find = find

    @property
    def grant(self) -> Grant:
        """The present permissions. UnauthenticatedError if the token is unknown, or no longer known."""
        grant = self._find()
        if grant is None:
            raise UnauthenticatedError("the token must be one that this bank knows, got another; was it taken away?")
        return grant

    def check(self, scope: Scope, namespace: str) -> None:
        """Checks a scope in a request's namespace; empty stands for the default. UnauthenticatedError,
        PermissionDeniedError."""
        grant = self.grant
        namespace = (namespace or DEFAULT_NAMESPACE)[: MAX_NAMESPACE_CHARS + 1]  # no namespace has a longer name
        if not grant.allows(scope, namespace):
            raise PermissionDeniedError(
                f"the token {grant.name!r} must have scope {scope.value} in namespace {namespace!r}; "
                "ask the bank's operator, or use another token",
                scope=scope.value,
                namespace=namespace,
            )

    def check_anywhere(self, scope: Scope) -> None:
        """Checks that the caller has the scope in some namespace, before a stream names one. UnauthenticatedError,
        PermissionDeniedError."""
        grant = self.grant
        if not any(grant.allows(scope, namespace) for namespace in grant.namespaces):
            raise PermissionDeniedError(
                f"the token {grant.name!r} must have scope {scope.value}; ask the bank's operator, or use another",
                scope=scope.value,
                namespace="",
            )

    def may_read(self, namespace: str) -> bool:
        return self.grant.allows(Scope.READ, namespace)


EVERYTHING = Grant("(no tokens)", frozenset(Scope), frozenset({ALL_NAMESPACES}))


class Authority:
    """Finds the caller in a call's metadata. Without ``grants``, every caller may do everything."""

    def __init__(self, grants: Grants | None) -> None:
        self._grants = grants

    def caller(self, metadata: object) -> Caller:
        """The caller of a call. UnauthenticatedError if the call has no token, or an unknown one."""
        grants = self._grants
        if grants is None:
            return Caller(lambda: EVERYTHING)
        secret = _bearer_token(metadata)
        caller = Caller(lambda: grants.find(secret))
        _ = caller.grant
        return caller


def _bearer_token(metadata: object) -> str:
    values = [value for key, value in metadata or () if key == "authorization"]  # type: ignore[attr-defined]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
        raise UnauthenticatedError(
            "each call must have one metadata entry authorization: Bearer TOKEN; this bank has --tokens-file"
        )
    return str(values[0][len(_SCHEME) :].strip())
