"""A table of the documents' metadata, for filters.

It has a row for each metadata pair of a living document. The transaction that writes a document writes its rows. An
index over (namespace, name, value) finds the few matching documents among a million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from bank_service.catalog.contract import MAX_KEYS
from bank_service.catalog.sql.prepared import Prepared
from bank_service.catalog.sql.tables import living, now, versions
from bank_service.catalog.sqlite.sqlite_tables import own_metadata
from bank_service.values.filters import Condition, Operator

attributes = sa.Table(
    "attributes",
    own_metadata,
    sa.Column("key", sa.Integer, primary_key=True),  # of the document
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("value", sa.Text, nullable=False),
    sa.Index("attributes_by_value", "namespace", "name", "value", "key"),
    sqlite_with_rowid=False,
)


_INSERT = Prepared(sa.insert(attributes), [column.name for column in attributes.c])
_DELETE = Prepared(sa.delete(attributes).where(attributes.c.key == sa.bindparam("document")))


def put_attributes(connection: sa.Connection, key: int, namespace: str, pairs: Mapping[str, str]) -> None:
    """Adds the pairs of a document that has no rows yet."""
    for name, value in pairs.items():
        _INSERT.run(connection, key=key, name=name, namespace=namespace, value=value)


def remove_attributes(connection: sa.Connection, key: int) -> None:
    """Removes all pairs of a document."""
    _DELETE.run(connection, document=key)


def fill_attributes(connection: sa.Connection) -> None:
    """Fills the table from the versions' JSON, in a catalog that had none."""
    pairs = sa.func.json_each(versions.c.metadata).table_valued("key", "value").alias("pairs")
    rows = sa.select(versions.c.key, pairs.c.key, versions.c.namespace, pairs.c.value).where(living)
    names = ["key", "name", "namespace", "value"]
    connection.execute(sa.insert(attributes).from_select(names, rows.select_from(sa.join(versions, pairs, sa.true()))))


def matching(
    connection: sa.Connection,
    namespace: str,
    conditions: Sequence[Condition],
    limit: int | None = None,
    as_of: int | None = None,
) -> list[int]:
    """See ``CatalogView.matching``."""
    driver = _rarest(connection, namespace, conditions, limit)
    if driver is None:
        query = sa.select(versions.c.key).where(versions.c.namespace == namespace, living)
        key: sa.ColumnElement[int] = versions.c.key
    else:
        query = sa.select(attributes.c.key).where(_pair(attributes, driver), attributes.c.namespace == namespace)
        key = attributes.c.key
    if as_of is not None:
        query = query.where(_unchanged_since(as_of, key, is_joined=driver is None))
    query = query.where(*(holds(condition, key) for condition in conditions if condition is not driver))
    if limit is not None:
        query = query.limit(limit)
    return sorted(connection.execute(query).scalars())


def among(
    connection: sa.Connection, keys: Sequence[int], conditions: Sequence[Condition], as_of: int | None = None
) -> set[int]:
    """See ``CatalogView.among``."""
    found: set[int] = set()
    for start in range(0, len(keys), MAX_KEYS):
        query = sa.select(versions.c.key).where(
            versions.c.key.in_(keys[start : start + MAX_KEYS]),
            living,
            *(holds(condition, versions.c.key) for condition in conditions),
        )
        if as_of is not None:
            query = query.where(versions.c.began <= as_of)
        found.update(connection.execute(query).scalars())
    return found


def holds(condition: Condition, key: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """The condition on the document with this key, in SQL. It needs one lookup in the table's primary key."""
    table = attributes.alias()
    found = sa.exists().where(table.c.key == key, _pair(table, condition))
    return found if condition.operator in (Operator.EQUALS, Operator.PRESENT) else sa.not_(found)


def _unchanged_since(as_of: int, key: sa.ColumnElement[int], *, is_joined: bool) -> sa.ColumnElement[bool]:
    """In SQL: the document has not changed since ``as_of``. ``is_joined``: the query reads ``versions`` already."""
    if is_joined:
        return versions.c.began <= as_of
    return sa.exists().where(versions.c.key == key, now, versions.c.began <= as_of)


def _pair(table: sa.FromClause, condition: Condition) -> sa.ColumnElement[bool]:
    """In SQL: a row is the pair that the condition names."""
    named = table.c.name == condition.key
    return sa.and_(named, table.c.value.in_(condition.values)) if condition.values else named


def _rarest(
    connection: sa.Connection, namespace: str, conditions: Sequence[Condition], limit: int | None
) -> Condition | None:
    """The EQUALS condition that the fewest pairs meet. Counts up to ``limit`` pairs. None where there is no such
    condition."""
    counts: list[tuple[int, int]] = []
    for index, condition in enumerate(conditions):
        if condition.operator in (Operator.EQUALS, Operator.PRESENT):
            rows = sa.select(sa.literal(1)).where(attributes.c.namespace == namespace, _pair(attributes, condition))
            counted = sa.select(sa.func.count()).select_from(rows.limit(limit).subquery())
            counts.append((int(connection.execute(counted).scalar_one()), index))
    return conditions[min(counts)[1]] if counts else None
