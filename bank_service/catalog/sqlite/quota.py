"""What a namespace may hold, and how much it holds: counted by the database with each change, in its transaction.

The counters are a row per namespace, so that a check reads one row whatever the namespace's size; a sum over an index
would read all of its documents. Triggers keep them, not the code that writes documents: so they hold for every way
of writing, also that of an older program on the same file.

Past versions count, in full, towards the bytes: else a namespace could fill the disk with updates of one document.
Where history is kept, bytes come free when it expires, or at once by a purge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from bank_service.catalog.entries import Usage
from bank_service.errors import QuotaExceededError
from bank_service.values.namespace_limits import NamespaceLimits

_CHANGES = {
    "insert": "NEW.namespace, NOT NEW.deleted, NEW.num_text_bytes + NEW.gradient_bytes",
    "update": "NEW.namespace, OLD.deleted - NEW.deleted, "
    "NEW.num_text_bytes + NEW.gradient_bytes - OLD.num_text_bytes - OLD.gradient_bytes",
    "delete": "OLD.namespace, OLD.deleted - 1, -OLD.num_text_bytes - OLD.gradient_bytes",
}

_PAST_CHANGES = {  # a past version had a document before it, so its namespace has a row
    "insert": ("NEW", "NEW.num_text_bytes + NEW.gradient_bytes"),
    "update": ("NEW", "NEW.gradient_bytes - OLD.gradient_bytes"),
    "delete": ("OLD", "-OLD.num_text_bytes - OLD.gradient_bytes"),
}


def create_counters(connection: sa.Connection) -> None:
    """Adds the counters to a catalog that lacks them, and counts what is there. Call it in a transaction."""
    if not sa.inspect(connection).has_table("namespace_usage"):
        _count_documents(connection)
    for event, (row, change) in _PAST_CHANGES.items():
        connection.exec_driver_sql(
            f"CREATE TRIGGER IF NOT EXISTS history_{event}_usage AFTER {event.upper()} ON history BEGIN "
            f"UPDATE namespace_usage SET num_bytes = num_bytes + {change} WHERE namespace = {row}.namespace; END"
        )


def _count_documents(connection: sa.Connection) -> None:
    statements = [
        "CREATE TABLE namespace_usage (namespace TEXT PRIMARY KEY, num_documents BIGINT NOT NULL, "
        "num_bytes BIGINT NOT NULL) WITHOUT ROWID",
        "INSERT INTO namespace_usage SELECT namespace, SUM(NOT deleted), SUM(num_text_bytes + gradient_bytes) "
        "FROM documents GROUP BY namespace",
    ]
    for event, change in _CHANGES.items():
        statements.append(
            f"CREATE TRIGGER documents_{event}_usage AFTER {event.upper()} ON documents BEGIN "
            f"INSERT INTO namespace_usage VALUES ({change}) ON CONFLICT (namespace) DO UPDATE SET "
            "num_documents = num_documents + excluded.num_documents, num_bytes = num_bytes + excluded.num_bytes; END"
        )
    for statement in statements:
        connection.exec_driver_sql(statement)


def usage(connection: sa.Connection, namespace: str) -> Usage:
    query = sa.text("SELECT num_documents, num_bytes FROM namespace_usage WHERE namespace = :namespace")
    row = connection.execute(query, {"namespace": namespace}).one_or_none()
    return Usage() if row is None else Usage(*map(int, row))


def all_usage(connection: sa.Connection) -> dict[str, Usage]:
    """By namespace, in order, also of those that lost their last document."""
    rows = connection.exec_driver_sql("SELECT namespace, num_documents, num_bytes FROM namespace_usage ORDER BY 1")
    return {name: Usage(int(num_documents), int(num_bytes)) for name, num_documents, num_bytes in rows}


@contextmanager
def enforced(connection: sa.Connection, namespace: str, limits: NamespaceLimits) -> Iterator[None]:
    """Around a write: QuotaExceededError where it takes the namespace further above a limit; roll it back then.

    A write that takes less than what was there goes through, also where a limit was lowered below it. The catalog
    has one writer, so nothing changes between the two readings.
    """
    if not (limits.max_documents or limits.max_bytes):
        yield
        return
    before = usage(connection, namespace)
    yield
    _compare(namespace, limits, before, usage(connection, namespace))


def check_room(namespace: str, limits: NamespaceLimits, before: Usage, more: Usage) -> None:
    """QuotaExceededError where a write that adds ``more``, or more than that, could not be ``enforced`` now."""
    after = Usage(before.num_documents + more.num_documents, before.num_bytes + more.num_bytes)
    _compare(namespace, limits, before, after)


def _compare(namespace: str, limits: NamespaceLimits, before: Usage, after: Usage) -> None:
    for what, limit, old, new in (
        ("documents", limits.max_documents, before.num_documents, after.num_documents),
        ("bytes", limits.max_bytes, before.num_bytes, after.num_bytes),
    ):
        if limit and new > limit and new > old:
            raise QuotaExceededError(
                f"namespace {namespace!r} must have at most {limit} {what} (max_namespace_{what}), got {new} with "
                "this document; delete some (with purge where past versions are kept), or ask the bank's operator",
                limit=f"max_namespace_{what}",
                namespace=namespace,
            )
