"""What purges have still to erase outside of the catalog's rows: written in the purge's own transaction, so that a
crash forgets none of it.

A row stays until the purge was acknowledged and all is erased. So a purge whose erasing failed, or whose answer was
lost in a crash, can come again with the version that it expected, and what it left undone is done. ``Eraser`` says when
it is too late for that; without a version any purge can be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

import sqlalchemy as sa

from bank_service.catalog.entries import Erasure
from bank_service.catalog.sqlite.tables import metadata

erasures = sa.Table(
    "erasures",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("key", sa.Integer, nullable=False, index=True),  # of the document's row
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("digests", sa.Text, nullable=False),  # JSON array, of the gradients that may now belong to nobody
    sa.Column("acknowledged", sa.Boolean, nullable=False),
    sa.Column("erased", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)


def record(connection: sa.Connection, key: int, namespace: str, digests: Iterable[str]) -> int:
    """The number of a new erasure, in the place of what ``unacknowledged`` gave."""
    connection.execute(sa.delete(erasures).where(erasures.c.key == key, sa.not_(erasures.c.acknowledged)))
    values = {"key": key, "namespace": namespace, "digests": json.dumps(sorted(digests))}
    added = sa.insert(erasures).values(**values, acknowledged=False, erased=False).returning(erasures.c.number)
    return int(connection.execute(added).scalar_one())


def unacknowledged(connection: sa.Connection, key: int) -> set[str] | None:
    """The gradients of a document's purges that nobody was told the success of; None where there is no such purge."""
    query = sa.select(erasures.c.digests).where(erasures.c.key == key, sa.not_(erasures.c.acknowledged))
    found = connection.execute(query).scalars().all()
    return {digest for digests in found for digest in json.loads(digests)} if found else None


def acknowledge(connection: sa.Connection, number: int) -> None:
    """The caller of the purge is told that it succeeded."""
    _mark(connection, [number], "acknowledged")


def finish(connection: sa.Connection, numbers: Collection[int]) -> None:
    """Nothing of these is left anywhere."""
    _mark(connection, numbers, "erased")


def forget(connection: sa.Connection, numbers: Collection[int]) -> None:
    """Of these, those that are finished can't come again with the version that they expected."""
    connection.execute(sa.delete(erasures).where(erasures.c.number.in_(numbers), erasures.c.erased))


def unfinished(connection: sa.Connection, after: int, limit: int) -> list[Erasure]:
    """Up to ``limit`` of those with a number above ``after``, in order."""
    chosen = sa.select(erasures).where(erasures.c.number > after, sa.not_(erasures.c.erased))
    rows = connection.execute(chosen.order_by(erasures.c.number).limit(limit))
    return [Erasure(row.number, row.namespace, tuple(json.loads(row.digests))) for row in rows]


def repeatable(connection: sa.Connection) -> set[int]:
    """Those that are finished and were not acknowledged."""
    return set(connection.execute(sa.select(erasures.c.number).where(erasures.c.erased)).scalars())


def _mark(connection: sa.Connection, numbers: Collection[int], column: str) -> None:
    connection.execute(sa.update(erasures).where(erasures.c.number.in_(numbers)).values({column: True}))
    connection.execute(sa.delete(erasures).where(erasures.c.acknowledged, erasures.c.erased))
