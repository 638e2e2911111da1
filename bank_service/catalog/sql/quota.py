"""The limits of a namespace, and the counts that they bound.

Each namespace has a row with its counts, so a check reads one row. ``versions`` updates the counts in the transaction
of each change. ``sentence_rows`` counts vectors that come later.

The bytes of past versions count too. Otherwise a namespace could fill the disk with updates of one document. These
bytes become free when the versions expire, or at once by a purge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from bank_service.catalog.entries import Usage
from bank_service.catalog.sql.prepared import Prepared
from bank_service.catalog.sql.tables import namespace_usage, now, sentence_vectors, versions
from bank_service.errors import QuotaExceededError
from bank_service.values.namespace_limits import NamespaceLimits

NUM_SENTENCE_BYTES = (sa.func.length(sentence_vectors.c.places) + sa.func.length(sentence_vectors.c.vectors)).label(
    "num_bytes"
)
_USAGE = Prepared(
    sa.select(namespace_usage.c.num_documents, namespace_usage.c.num_bytes).where(
        namespace_usage.c.namespace == sa.bindparam("namespace")
    )
)
_COUNT = Prepared(
    sa.update(namespace_usage)
    .where(namespace_usage.c.namespace == sa.bindparam("space"))
    .values(
        num_documents=namespace_usage.c.num_documents + sa.bindparam("documents", type_=sa.BigInteger),
        num_bytes=namespace_usage.c.num_bytes + sa.bindparam("bytes", type_=sa.BigInteger),
    )
    .returning(namespace_usage.c.namespace)
)
_BEGIN_COUNT = Prepared(sa.insert(namespace_usage), ["namespace", "num_documents", "num_bytes"])


def count(connection: sa.Connection, namespace: str, *, num_documents: int, num_bytes: int) -> None:
    """Adds to a namespace's counts. Negative numbers subtract."""
    if not _COUNT.rows(connection, space=namespace, documents=num_documents, bytes=num_bytes):
        _BEGIN_COUNT.run(connection, namespace=namespace, num_documents=num_documents, num_bytes=num_bytes)


def count_anew(connection: sa.Connection) -> None:
    """Counts all versions again, for a catalog of an older schema."""
    connection.execute(sa.delete(namespace_usage))
    columns = versions.c
    sums = (
        sa.select(
            columns.namespace,
            sa.func.sum(sa.case((sa.and_(now, sa.not_(columns.deleted)), 1), else_=0)),
            sa.func.sum(columns.num_text_bytes + columns.gradient_bytes + sa.func.coalesce(NUM_SENTENCE_BYTES, 0)),
        )
        .select_from(sa.outerjoin(versions, sentence_vectors, columns.began == sentence_vectors.c.began))
        .group_by(columns.namespace)
    )
    connection.execute(sa.insert(namespace_usage).from_select(["namespace", "num_documents", "num_bytes"], sums))


def usage(connection: sa.Connection, namespace: str) -> Usage:
    row = _USAGE.one(connection, namespace=namespace)
    return Usage() if row is None else Usage(row["num_documents"], row["num_bytes"])


def all_usage(connection: sa.Connection) -> dict[str, Usage]:
    """Namespace → usage, in order of name. Namespaces that lost their last document are among them."""
    rows = connection.execute(sa.select(namespace_usage).order_by(namespace_usage.c.namespace))
    return {row.namespace: Usage(row.num_documents, row.num_bytes) for row in rows}


@contextmanager
def enforced(connection: sa.Connection, namespace: str, limits: NamespaceLimits) -> Iterator[None]:
    """Checks the write in its block. QuotaExceededError if the write grows the usage and exceeds a limit. Roll back
    then.

    A write that frees room succeeds, even if the usage is still above a lowered limit. Transactions that
    write come one after the other, so nothing else changes the counts meanwhile.
    """
    if not (limits.max_documents or limits.max_bytes):
        yield
        return
    before = usage(connection, namespace)
    yield
    _compare(namespace, limits, before, usage(connection, namespace))


def check_room(namespace: str, limits: NamespaceLimits, before: Usage, more: Usage) -> None:
    """QuotaExceededError where a write that adds at least ``more`` would now exceed a limit."""
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
