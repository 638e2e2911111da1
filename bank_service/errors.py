"""The errors of a bank. These errors know no gRPC; ``wire/errors.py`` maps them to status codes."""

from __future__ import annotations

from typing import ClassVar


class BankError(Exception):
    """Base of every error that a bank answers with.

    ``index`` is the request's place in its stream or batch, where it had one.
    """

    field_names: ClassVar[tuple[str, ...]] = ()  # attributes that a caller's program can read, besides the message

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.index: int | None = None
        self.by_bank = True  # False: gRPC refused or broke the call, and the message has its words

    def fields(self) -> dict[str, str]:
        """The attributes named in ``field_names``, as text."""
        return {name: str(getattr(self, name)) for name in self.field_names}


class InvalidArgumentError(BankError):
    """A request breaks the contract. No state of the bank would make it valid."""

    field_names = ("field",)

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field  # path within the request, e.g. "document.text"


class NotFoundError(BankError):
    """No namespace, document or gradient has that name."""

    field_names = ("kind", "name")

    def __init__(self, message: str, *, kind: str, name: str) -> None:
        super().__init__(message)
        self.kind = kind  # "namespace", "document" or "gradient"
        self.name = name


class VersionConflictError(BankError):
    """The document's version is not the one that the writer expected."""

    field_names = ("namespace", "id", "expected_version", "actual_version")

    def __init__(
        self, message: str, *, namespace: str, id: str, expected_version: int | str, actual_version: int | str
    ) -> None:
        super().__init__(message)
        self.namespace = namespace
        self.id = id
        self.expected_version = int(expected_version)
        self.actual_version = int(actual_version)  # 0: there is no such document


class LearnerMismatchError(BankError):
    """A gradient or a request belongs to another learner than the collection.

    ``expected`` is the fingerprint of the collection's learner, ``actual`` the other's.
    """

    field_names = ("expected", "actual")

    def __init__(self, message: str, *, expected: str, actual: str) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class LimitExceededError(BankError):
    """A well-formed request needs more than the bank allows."""

    field_names = ("limit",)

    def __init__(self, message: str, *, limit: str) -> None:
        super().__init__(message)
        self.limit = limit  # the limit's name, e.g. "max_message_bytes"


class OutOfRangeError(BankError):
    """A well-formed request asks about a past that the bank no longer keeps."""

    field_names = ("field", "limit")

    def __init__(self, message: str, *, field: str, limit: int | str) -> None:
        super().__init__(message)
        self.field = field  # path within the request
        self.limit = int(limit)  # the field's lowest value


class UnauthenticatedError(BankError):
    """The call has no token, or one that the bank doesn't know."""


class PermissionDeniedError(BankError):
    """The token does not allow this. The error does not tell whether the namespace exists."""

    field_names = ("scope", "namespace")

    def __init__(self, message: str, *, scope: str, namespace: str) -> None:
        super().__init__(message)
        self.scope = scope  # the one that the token lacks
        self.namespace = namespace


class QuotaExceededError(BankError):
    """A namespace has reached one of its limits."""

    field_names = ("limit", "namespace", "retry_after_ms")

    def __init__(self, message: str, *, limit: str, namespace: str, retry_after_ms: int | str = 0) -> None:
        super().__init__(message)
        self.limit = limit  # the limit's name, e.g. "max_namespace_documents"
        self.namespace = namespace
        self.retry_after_ms = int(retry_after_ms)  # 0: another try would fail too


class OverloadedError(BankError):
    """The bank is busy and did not begin this request. The caller should try again."""

    field_names = ("limit", "retry_after_ms")

    def __init__(self, message: str, *, limit: str, retry_after_ms: int | str) -> None:
        super().__init__(message)
        self.limit = limit  # the limit's name, e.g. "max_calls"
        self.retry_after_ms = int(retry_after_ms)


class DataLossError(BankError):
    """A stored gradient is missing or corrupt."""

    field_names = ("digest",)

    def __init__(self, message: str, *, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


class UnavailableError(BankError):
    """The bank can't answer now: it is starting, draining, or its disk fails. The caller should try again."""


class UnreachableError(UnavailableError):
    """No bank answered the call: there is none at the address, or the network is broken. A bank never sends it."""


class CatalogReadError(UnavailableError):
    """The catalog can't be read now."""


class ReplicaReadError(CatalogReadError):
    """A replica of the catalog can't be read now, though the catalog itself may be."""


class DeadlineExceededError(BankError):
    """The caller's deadline passed before the answer."""


class InternalError(BankError):
    """A fault of the bank or its encoder, not of the request."""


class CollectionMismatchError(Exception):
    """The data directory holds a collection of another learner, layout, codec or embedder."""


class BankInUseError(Exception):
    """Another bank owns the data directory."""


class CatalogDamagedError(Exception):
    """The catalog's file is damaged or lost, so the bank can't know its documents."""


class SnapshotError(Exception):
    """A snapshot can't be written, or is not whole."""
