"""Carries the rows of a stopped catalog into a new one, and compares both.

A row is the same in every store. Only the collection gets another id: its source stays, and the two go different ways.
A store makes the rows of its own searches from these rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import sqlalchemy as sa

from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.collection_row import SCHEMA_VERSION, check_known
from bank_service.catalog.sql.tables import collection, living, metadata, versions
from bank_service.errors import CatalogDamagedError, CollectionMismatchError

PAGE_ROWS = 1_000  # in memory at once

Rows: TypeAlias = Sequence[Sequence[Any]]  # the values of each row, in the order of the table's columns


class StoppedSqlCatalog:
    """Implements ``StoppedCatalog``."""

    def __init__(self, view: SqlView, place: str) -> None:
        """``place`` is for errors. CollectionMismatchError for a schema of another version, or without a collection."""
        row = None
        if sa.inspect(view.connection).has_table(collection.name):
            row = view.connection.execute(sa.select(collection)).one_or_none()
        if row is None:
            raise CollectionMismatchError(f"{place} must have a bank's catalog, it has none; name another place")
        check_known(row.schema_version, place)
        if row.schema_version != SCHEMA_VERSION:
            raise CollectionMismatchError(
                f"the catalog in {place} must have schema {SCHEMA_VERSION}, got {row.schema_version}; start its bank "
                "once with this version"
            )
        self.connection = view.connection
        self.collection_id = str(row.uuid)
        self.embedding_dimension = int(row.embedding_dimension)
        self.sequence = int(row.sequence)
        self._view = view

    def gradients(self) -> Iterator[list[str]]:
        last = ""
        while page := list(self._view.gradients(last, PAGE_ROWS)):
            yield page
            last = page[-1]

    def living_vectors(self) -> Iterator[Rows]:
        """Namespace, key, began, metadata and embedding of each living document, in pages."""
        columns = versions.c
        chosen = sa.select(columns.namespace, columns.key, columns.began, columns.metadata, columns.embedding)
        return _pages(self.connection, chosen.where(living), columns.began)


def carry(source: StoppedSqlCatalog, collection_id: str, write: Callable[[sa.Table, Rows], None]) -> None:
    """Gives all rows of all tables to ``write``, in pages. The collection gets the id ``collection_id``."""
    for table in metadata.sorted_tables:
        for rows in _rows(source.connection, table, collection_id):
            write(table, rows)


def compare(source: StoppedSqlCatalog, target: sa.Connection, collection_id: str) -> dict[str, int]:
    """Compares all rows of both catalogs by their digest. Returns the number of rows of each table.

    CatalogDamagedError where they differ.
    """
    counts = {}
    for table in metadata.sorted_tables:
        wanted, got = (_digest(_rows(each, table, collection_id)) for each in (source.connection, target))
        if wanted != got:
            raise CatalogDamagedError(
                f"the table {table.name} must be the same after the move, got {got[0]:,} rows of {wanted[0]:,} or "
                "other values; if the source has changed since the move began, remove the target and move it again"
            )
        counts[table.name] = wanted[0]
    return counts


def _rows(connection: sa.Connection, table: sa.Table, collection_id: str) -> Iterator[Rows]:
    (key,) = table.primary_key.columns
    columns = [sa.literal(collection_id).label("uuid") if column is collection.c.uuid else column for column in table.c]
    return _pages(connection, sa.select(*columns), key)


def _pages(connection: sa.Connection, query: sa.Select[Any], key: sa.ColumnElement[Any]) -> Iterator[Rows]:
    """The rows of a query in order of ``key``, which must be one of its columns."""
    place = [column.name for column in query.selected_columns].index(key.name)
    query = query.order_by(key).limit(PAGE_ROWS)
    rows = connection.execute(query).all()
    while rows:
        yield rows
        rows = connection.execute(query.where(key > rows[-1][place])).all()


def _digest(pages: Iterator[Rows]) -> tuple[int, str]:
    """The number of rows, and the SHA-256 of all their values."""
    number, digest = 0, hashlib.sha256()
    for rows in pages:
        number += len(rows)
        for row in rows:
            digest.update(repr(tuple(row)).encode())
    return number, digest.hexdigest()
