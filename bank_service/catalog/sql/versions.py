"""Writes of versions. Only this module adds, ends and removes versions, so it also counts the namespaces' usage.

The vectors of a version's sentences count with it. They are added before the version, and removed after it. Its
gradient of the next learner is removed with it, and doesn't count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import sqlalchemy as sa

from bank_service.catalog.sql import next_rows, sentence_rows
from bank_service.catalog.sql.history import move_horizon
from bank_service.catalog.sql.prepared import Prepared
from bank_service.catalog.sql.quota import count
from bank_service.catalog.sql.tables import now, past, versions
from bank_service.values.documents import Gradient

Row: TypeAlias = Mapping[str, Any] | sa.RowMapping

_CURRENT = Prepared(
    sa.select(versions).where(
        versions.c.namespace == sa.bindparam("namespace"), versions.c.id == sa.bindparam("id"), now
    )
)
_INSERT = Prepared(sa.insert(versions), [column.name for column in versions.c])
_OF_ROW = versions.c.began == sa.bindparam("row")
_END = Prepared(sa.update(versions).where(_OF_ROW), ["ended", "ended_us"])
_REMOVE = Prepared(sa.delete(versions).where(_OF_ROW))
_MARK_PURGED = Prepared(sa.update(versions).where(_OF_ROW), ["purged"])


def current(connection: sa.Connection, namespace: str, id: str) -> Row | None:
    """The document's present version, which may be a deletion. None where it never existed."""
    return _CURRENT.one(connection, namespace=namespace, id=id)


def add(connection: sa.Connection, row: Row) -> None:
    """Adds a present version. The one before must have ended."""
    _INSERT.run(connection, ended=None, ended_us=None, **row)
    count(connection, row["namespace"], num_documents=int(not row["deleted"]), num_bytes=_num_bytes(connection, row))


def end(connection: sa.Connection, row: Row, sequence: int) -> None:
    """Makes the present version a past one, which ended with the change ``sequence``."""
    _END.run(connection, row=row["began"], ended=sequence, ended_us=time.time_ns() // 1000)
    count(connection, row["namespace"], num_documents=-int(not row["deleted"]), num_bytes=0)


def remove(connection: sa.Connection, row: Row) -> frozenset[str]:
    """Removes a present version. Returns the digests of its gradients."""
    _REMOVE.run(connection, row=row["began"])
    count(connection, row["namespace"], num_documents=-int(not row["deleted"]), num_bytes=-_num_bytes(connection, row))
    sentence_rows.remove(connection, [row["began"]])
    return frozenset([row["gradient_digest"], *next_rows.remove(connection, [row["began"]])])


def mark_purged(connection: sa.Connection, row: Row) -> None:
    """Marks a deletion: the document's past versions are purged."""
    _MARK_PURGED.run(connection, row=row["began"], purged=True)


def remove_past(connection: sa.Connection, key: int) -> set[str]:
    """Removes all past versions of a document. Returns the digests of their gradients."""
    return set(_remove_past(connection, versions.c.key == key))


def expire(connection: sa.Connection, before_us: int | None, limit: int) -> list[str] | None:
    """See ``Catalog.expire_history``. Moves the horizons of the namespaces that lose a version."""
    columns = versions.c
    query = sa.select(columns.began, columns.namespace, columns.ended).where(past)
    if before_us is not None:
        query = query.where(columns.ended_us < before_us)
    rows = connection.execute(query.order_by(columns.ended_us).limit(limit)).all()
    if not rows:
        return None
    for namespace in {row.namespace for row in rows}:
        move_horizon(connection, namespace, max(row.ended for row in rows if row.namespace == namespace))
    return sorted(set(_remove_past(connection, columns.began.in_([row.began for row in rows]))))


def replace_past_gradient(connection: sa.Connection, began: int, digest: str, gradient: Gradient) -> bool:
    """See ``Catalog.replace_past_gradient``."""
    chosen = (versions.c.began == began, versions.c.gradient_digest == digest, past)
    row = connection.execute(sa.select(versions.c.namespace, versions.c.gradient_bytes).where(*chosen)).one_or_none()
    if row is None:
        return False
    values = {
        "gradient_digest": gradient.digest,
        "gradient_bytes": gradient.num_bytes,
        "num_tokens": gradient.num_tokens,
        "truncated": gradient.truncated,
    }
    connection.execute(sa.update(versions).where(*chosen).values(**values))
    count(connection, row.namespace, num_documents=0, num_bytes=gradient.num_bytes - row.gradient_bytes)
    return True


def _remove_past(connection: sa.Connection, chosen: sa.ColumnElement[bool]) -> list[str]:
    """Removes past versions. Returns the digests of their gradients."""
    columns = versions.c
    gone = sa.delete(versions).where(chosen, past)
    returned = (
        columns.began, columns.namespace, columns.gradient_digest, columns.gradient_bytes, columns.num_text_bytes
    )  # fmt: skip
    rows = connection.execute(gone.returning(*returned)).mappings().all()
    for row in rows:
        count(connection, row["namespace"], num_documents=0, num_bytes=-_num_bytes(connection, row))
    began = [row["began"] for row in rows]
    sentence_rows.remove(connection, began)
    return [*(row["gradient_digest"] for row in rows), *next_rows.remove(connection, began)]


def _num_bytes(connection: sa.Connection, row: Row) -> int:
    return int(row["num_text_bytes"] + row["gradient_bytes"]) + sentence_rows.num_bytes(connection, row["began"])
