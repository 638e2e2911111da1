"""The traces that purges have still to erase outside of the catalog's rows.

A purge writes a row in its own transaction, so a crash loses none. The row is removed when all traces are erased.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import sqlalchemy as sa

from bank_service.catalog.entries import Erasure
from bank_service.catalog.sql.tables import Name, Number, metadata

pending_erasures = sa.Table(
    "pending_erasures",
    metadata,
    sa.Column("number", Number, primary_key=True, autoincrement=True),
    sa.Column("key", sa.BigInteger, nullable=False, index=True),  # of the document
    sa.Column("namespace", Name, nullable=False),
    sa.Column("digests", sa.Text, nullable=False),  # JSON array of gradients that perhaps no document names any more
    sqlite_autoincrement=True,
)


def record(connection: sa.Connection, key: int, namespace: str, digests: Collection[str]) -> frozenset[str]:
    """Replaces the document's earlier erasures by a new one with all their digests. Returns these digests."""
    columns = pending_erasures.c
    gone = sa.delete(pending_erasures).where(columns.key == key).returning(columns.digests)
    earlier = connection.execute(gone).scalars().all()
    together = frozenset(digests).union(*map(json.loads, earlier))
    values = {"key": key, "namespace": namespace, "digests": json.dumps(sorted(together))}
    connection.execute(sa.insert(pending_erasures).values(**values))
    return together


def pending(connection: sa.Connection, after: int, limit: int) -> list[Erasure]:
    """See ``CatalogView.pending_erasures``."""
    columns = pending_erasures.c
    query = sa.select(columns.number, columns.namespace, columns.digests).where(columns.number > after)
    rows = connection.execute(query.order_by(columns.number).limit(limit))
    return [Erasure(row.number, row.namespace, tuple(json.loads(row.digests))) for row in rows]


def finish(connection: sa.Connection, numbers: Collection[int]) -> None:
    """See ``Catalog.finish_erasures``."""
    connection.execute(sa.delete(pending_erasures).where(pending_erasures.c.number.in_(numbers)))
