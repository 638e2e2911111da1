"""Counts and limits the calls in progress.

The bank refuses a call above a limit at once, and says when to try again. An ingest stream has a limited number of
documents under way, and reads no further meanwhile. So the bank's memory doesn't grow with its callers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from bank_service.errors import OverloadedError, QuotaExceededError
from bank_service.service.access import Caller, Scope
from bank_service.values.config import BankConfig
from bank_service.values.namespace_limits import LimitsOf
from bank_service.wire.limits import DEFAULT_NAMESPACE, RETRY_AFTER_MS

_KINDS = {"IngestDocuments": "ingests", "IngestGradients": "ingests", "Query": "queries", "BatchQuery": "queries"}


class Admission:
    """Counts the calls of one bank. Used in its event loop only."""

    def __init__(self, config: BankConfig, limits_of: LimitsOf) -> None:
        self._most = {"calls": config.max_calls, "ingests": config.max_ingests, "queries": config.max_queries}
        self._limits_of = limits_of
        self._in_progress: Counter[str] = Counter()  # by kind
        self._in_namespace: Counter[str] = Counter()

    @contextmanager
    def admitted(self, method: str) -> Iterator[Permit]:
        """Gives a permit for one call, inside the block. OverloadedError if none is free."""
        kinds = ["calls", *({_KINDS[method]} if method in _KINDS else ())]
        for kind in kinds:
            if self._in_progress[kind] >= self._most[kind]:
                raise OverloadedError(
                    f"the bank takes {self._most[kind]} {kind} at a time (max_{kind}) and has as many; try again later",
                    limit=f"max_{kind}",
                    retry_after_ms=RETRY_AFTER_MS,
                )
        self._in_progress.update(kinds)
        permit = Permit(self)
        try:
            yield permit
        finally:
            self._in_progress.subtract(kinds)
            self._in_namespace.subtract(permit.namespaces)
            self._in_namespace += Counter()  # drops the zeros

    def enter(self, namespace: str) -> None:
        """Counts a request in a namespace. QuotaExceededError if the namespace has reached its limit of requests."""
        most = self._limits_of(namespace).max_requests
        if most and self._in_namespace[namespace] >= most:
            raise QuotaExceededError(
                f"namespace {namespace!r} must have at most {most} requests in flight (max_namespace_requests), "
                f"got one more; try again later",
                limit="max_namespace_requests",
                namespace=namespace,
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._in_namespace[namespace] += 1


class Permit:
    """The permit of one call. A stream counts as one request in each namespace of its documents, until it ends."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.namespaces: set[str] = set()

    def enter(self, namespace: str) -> None:
        if namespace not in self.namespaces:
            self._admission.enter(namespace)
            self.namespaces.add(namespace)


class Call:
    """The permissions and the permit of a call. The servicer checks each request before it does any work for it."""

    def __init__(self, caller: Caller, permit: Permit) -> None:
        self.caller = caller
        self._permit = permit

    def check(self, scope: Scope, namespace: str) -> None:
        """Checks a scope in a namespace and counts the request there. UnauthenticatedError, PermissionDeniedError,
        QuotaExceededError."""
        self.caller.check(scope, namespace)
        self.enter(namespace or DEFAULT_NAMESPACE)

    def enter(self, namespace: str) -> None:
        """Counts the call in a namespace that its request does not name, such as a gradient's. QuotaExceededError."""
        self._permit.enter(namespace)
