"""The errors that every catalog raises, with the same texts."""

from __future__ import annotations

from bank_service.errors import NotFoundError, VersionConflictError


def document_not_found(namespace: str, id: str) -> NotFoundError:
    return NotFoundError(f"document {id!r} is not in namespace {namespace!r}", kind="document", name=id)


def namespace_not_found(namespace: str) -> NotFoundError:
    return NotFoundError(f"namespace {namespace!r} has no documents", kind="namespace", name=namespace)


def version_conflict(namespace: str, id: str, expected: int, actual: int) -> VersionConflictError:
    state = f"version {actual}" if actual else "no such document"
    return VersionConflictError(
        f"document {id!r} in namespace {namespace!r} must be at version {expected} (0: absent), got {state}; "
        "read it again and retry",
        namespace=namespace,
        id=id,
        expected_version=expected,
        actual_version=actual,
    )
