"""A catalog in SQLite that no bank has open, for reading, and a new one with the same rows."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa

from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.tables import metadata
from bank_service.catalog.sql.transfer import Rows, StoppedSqlCatalog, carry, compare
from bank_service.catalog.sqlite.attributes import fill_attributes
from bank_service.catalog.sqlite.catalog_file import check_catalog, reading
from bank_service.catalog.sqlite.lexical import fill_words
from bank_service.catalog.sqlite.sqlite_search_rows import SqliteSearchRows
from bank_service.catalog.sqlite.sqlite_tables import own_metadata
from bank_service.catalog.stopped import StoppedCatalog
from bank_service.errors import CollectionMismatchError


@contextmanager
def stopped(path: Path) -> Iterator[StoppedSqlCatalog]:
    """The caller keeps banks out of the folder. CollectionMismatchError where there is no catalog,
    CatalogDamagedError."""
    mode = reading(path)
    if not path.is_file():
        raise CollectionMismatchError(f"{path.parent} must be the folder of a bank, it has no {path.name}")
    check_catalog(path, mode)
    engine = sa.create_engine(f"sqlite:///file:{quote(str(path.absolute()))}?{mode}&uri=true")
    try:
        with engine.connect() as connection:
            yield StoppedSqlCatalog(SqlView(connection, SqliteSearchRows()), str(path.parent))
    finally:
        engine.dispose()


def load(path: Path, source: StoppedCatalog, collection_id: str) -> dict[str, int]:
    """Makes the file at ``path`` of another catalog. It appears whole, in place of an older one, or not at all.

    Returns the number of rows of each table. CatalogDamagedError where the rows differ. OSError.
    """
    assert isinstance(source, StoppedSqlCatalog)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    engine = sa.create_engine(f"sqlite:///{new}")
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA journal_mode=OFF"))
    try:
        with engine.begin() as connection:
            metadata.create_all(connection)
            own_metadata.create_all(connection)
            carry(source, collection_id, lambda table, rows: _insert(connection, table, rows))
            fill_attributes(connection)
            fill_words(connection)
            counts = compare(source, connection, collection_id)
    except sa.exc.DBAPIError as error:
        if not isinstance(error.orig, sqlite3.Error):
            raise
        raise OSError(f"{path} must be writable, got {error.orig}; is the disk full?") from error
    finally:
        engine.dispose()
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
    return counts


def _insert(connection: sa.Connection, table: sa.Table, rows: Rows) -> None:
    connection.execute(sa.insert(table), [dict(zip(table.c.keys(), row, strict=True)) for row in rows])
