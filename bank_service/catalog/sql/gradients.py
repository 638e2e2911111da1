"""Reads by gradient, over documents and past versions, and the catalog's totals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.entries import Totals
from bank_service.catalog.sql import next_rows
from bank_service.catalog.sql.prepared import Prepared, among, listed
from bank_service.catalog.sql.quota import all_usage
from bank_service.catalog.sql.rows import to_stored
from bank_service.catalog.sql.tables import horizons, past, versions
from bank_service.values.documents import StoredDocument
from bank_service.wire import limits

_DIGEST: sa.ColumnElement[Any] = versions.c.gradient_digest
_SIZE = sa.func.max(versions.c.gradient_bytes)
_SIZES = Prepared(sa.select(_DIGEST, _SIZE).where(_DIGEST.in_(among("digests"))).group_by(_DIGEST))
_NAMESPACES = Prepared(sa.select(_DIGEST, versions.c.namespace).where(_DIGEST.in_(among("digests"))).distinct())


def sizes(connection: sa.Connection, digests: Sequence[str]) -> dict[str, int]:
    """See ``CatalogView.gradient_sizes``."""
    chosen = listed(digests)
    own = {digest: int(size) for digest, size in _SIZES.rows(connection, digests=chosen)}
    return next_rows.sizes(connection, chosen) | own


def page(connection: sa.Connection, after_digest: str, limit: int) -> dict[str, int]:
    """See ``CatalogView.gradients``."""
    query = sa.select(_DIGEST, _SIZE).where(after_digest < _DIGEST).group_by(_DIGEST).order_by(_DIGEST).limit(limit)
    own = {digest: int(size) for digest, size in connection.execute(query)}
    both = next_rows.page(connection, after_digest, limit) | own
    return {digest: both[digest] for digest in sorted(both)[:limit]}


def namespaces(connection: sa.Connection, digests: Sequence[str]) -> dict[str, set[str]]:
    """See ``CatalogView.gradient_namespaces``."""
    found: dict[str, set[str]] = {}
    chosen = listed(digests)
    for digest, namespace in (
        *_NAMESPACES.rows(connection, digests=chosen),
        *next_rows.namespaces(connection, chosen),
    ):
        found.setdefault(digest, set()).add(namespace)
    return found


def owners(connection: sa.Connection, digest: str, limit: int, held: sa.ColumnElement[bool]) -> list[StoredDocument]:
    """Up to ``limit`` versions with a gradient. ``held``: ``tables.now`` or ``tables.past``."""
    query = sa.select(versions).where(versions.c.gradient_digest == digest, held).limit(limit)
    return [to_stored(row) for row in connection.execute(query).mappings()]


def totals(connection: sa.Connection, may_see: Callable[[str], bool] | None) -> Totals:
    """See ``CatalogView.totals``."""
    counts = {name: used.num_documents for name, used in all_usage(connection).items()}
    if may_see is not None:
        counts = {name: count for name, count in counts.items() if may_see(name)}

    def seen(table: sa.Table) -> sa.ColumnElement[bool]:
        if may_see is None:
            return sa.true()
        # As an expression, it keeps SQLite from the index by namespace. With that index it would read a row for each
        # digest.
        return (table.c.namespace + "").in_(list(counts))

    # A gradient that several documents or past versions have counts once.
    each = sa.select(_SIZE.label("size")).where(_DIGEST.is_not(None), seen(versions)).group_by(_DIGEST).subquery()
    sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(each.c.size), 0)).select_from(each)
    num_gradients, gradient_bytes = connection.execute(sums).one()
    num_past = sa.select(sa.func.count()).select_from(versions).where(past)
    if may_see is not None:
        num_past = num_past.where(versions.c.namespace.in_(list(counts)))
    oldest = sa.select(sa.func.coalesce(sa.func.max(horizons.c.sequence), 0)).where(seen(horizons))
    default = {limits.DEFAULT_NAMESPACE: 0} if may_see is None or may_see(limits.DEFAULT_NAMESPACE) else {}
    return Totals(
        {**default, **counts},
        int(num_gradients),
        int(gradient_bytes),
        int(connection.execute(num_past).scalar_one()),
        int(connection.execute(oldest).scalar_one()),
    )
