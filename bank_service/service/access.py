"""Permissions: scopes on namespaces. The servicer asks here for each request, before anything is done for it.

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
    """A permission of a token in its namespaces. Admin includes the others."""

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
        """Admin of all namespaces: also of what belongs to none of them, as the cache's figures."""
        return Scope.ADMIN in self.scopes and ALL_NAMESPACES in self.namespaces


class Grants(Protocol):
    """Where the tokens are known."""

    def find(self, secret: str) -> Grant | None:
        """The present permissions of the token with this secret; None for an unknown one."""


class Caller:
    """One call's rights. Looked up again for each request of a stream: a token taken away ends the stream."""

    def __init__(self, find: Callable[[], Grant | None]) -> None:
        self._find = find

    @property
    def grant(self) -> Grant:
        """UnauthenticatedError where the token is unknown, or no longer known."""
        grant = self._find()
        if grant is None:
            raise UnauthenticatedError("the token must be one that this bank knows, got another; was it taken away?")
        return grant

    def check(self, scope: Scope, namespace: str) -> None:
        """``namespace`` as the request has it, empty for the default. UnauthenticatedError, PermissionDeniedError."""
        grant = self.grant
        namespace = (namespace or DEFAULT_NAMESPACE)[: MAX_NAMESPACE_CHARS + 1]  # a longer one is nobody's
        if not grant.allows(scope, namespace):
            raise PermissionDeniedError(
                f"the token {grant.name!r} must have scope {scope.value} in namespace {namespace!r}; "
                "ask the bank's operator, or use another token",
                scope=scope.value,
                namespace=namespace,
            )

    def check_anywhere(self, scope: Scope) -> None:
        """Whether there is a namespace at all in which the caller has the scope: before a stream names one.
        UnauthenticatedError, PermissionDeniedError."""
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
    """Makes a caller of a call's metadata. Without ``grants`` the bank is open to all."""

    def __init__(self, grants: Grants | None) -> None:
        self._grants = grants

    def caller(self, metadata: object) -> Caller:
        """UnauthenticatedError where no token, or an unknown one, came with the call."""
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
