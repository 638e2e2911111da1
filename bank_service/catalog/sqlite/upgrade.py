"""Upgrades a catalog of an older schema when it is opened."""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa

from bank_service.catalog.sql.collection_row import SCHEMA_VERSION
from bank_service.catalog.sql.erasures import pending_erasures
from bank_service.catalog.sql.history import fill_horizons
from bank_service.catalog.sql.quota import count_anew
from bank_service.catalog.sql.tables import collection, now, versions
from bank_service.catalog.sqlite.attributes import fill_attributes
from bank_service.catalog.sqlite.lexical import fill_words

logger = logging.getLogger(__name__)

MOVED_ROWS = 5_000  # rows moved at a time, so that the file reuses the room of earlier ones
_IN_BOTH = (
    "key, namespace, id, version, updated_us, content_digest, gradient_digest, gradient_bytes, num_tokens, truncated, "
    "num_text_bytes, title, metadata, embedding, text"
)


def upgrade(connection: sa.Connection, schema_version: int, path: Path) -> sa.RowMapping:
    """Upgrades in the caller's transaction, whole or not at all. All tables must exist. Returns the collection's
    row."""
    logger.info("upgrading the catalog %s from schema %d; minutes for a million documents", path, schema_version)
    if schema_version < 5:
        _join_versions(connection)
    if schema_version < 2:
        fill_attributes(connection)
    if schema_version < 3:
        fill_horizons(connection)
    if schema_version < 5:
        _move_erasures(connection)
    if schema_version < 6:
        fill_words(connection)
    if schema_version < 8:
        count_anew(connection)
    connection.execute(sa.update(collection).values(schema_version=SCHEMA_VERSION))
    return connection.execute(sa.select(collection)).mappings().one()


def _join_versions(connection: sa.Connection) -> None:
    """Moves the rows of ``documents`` and ``history`` into ``versions``. Their triggers go with the tables."""
    for index in versions.indexes:
        index.drop(connection)
    _move(connection, "documents", "sequence", {"ended": "NULL", "ended_us": "NULL", "deleted": "deleted"})
    if sa.inspect(connection).has_table("history"):
        _move(connection, "history", "began", {"ended": "ended", "ended_us": "ended_us", "deleted": "FALSE"})
    for index in versions.indexes:
        index.create(connection)


def _move(connection: sa.Connection, table: str, began: str, values: dict[str, str]) -> None:
    for (trigger,) in connection.exec_driver_sql(
        "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", (table,)
    ).all():
        connection.exec_driver_sql(f"DROP TRIGGER {trigger}")
    names, sources = ", ".join(values), ", ".join(values.values())
    while True:
        page = f"SELECT max({began}) FROM (SELECT {began} FROM {table} ORDER BY {began} LIMIT {MOVED_ROWS})"
        last = connection.exec_driver_sql(page).scalar_one()
        if last is None:
            break
        connection.exec_driver_sql(
            f"INSERT INTO versions (began, purged, {names}, {_IN_BOTH}) "
            f"SELECT {began}, FALSE, {sources}, {_IN_BOTH} FROM {table} WHERE {began} <= ? ORDER BY {began}",
            (last,),
        )
        connection.exec_driver_sql(f"DELETE FROM {table} WHERE {began} <= ?", (last,))
    connection.exec_driver_sql(f"DROP TABLE {table}")


def _move_erasures(connection: sa.Connection) -> None:
    """Unfinished erasures move into ``pending_erasures``; every purge that had a row may come again."""
    if not sa.inspect(connection).has_table("erasures"):
        return
    purged = sa.text("SELECT key FROM erasures").columns(sa.column("key", sa.BigInteger))
    deletions = sa.update(versions).where(now, versions.c.deleted, versions.c.key.in_(purged))
    connection.execute(deletions.values(purged=True))
    columns = "number, key, namespace, digests"
    connection.exec_driver_sql(
        f"INSERT INTO {pending_erasures.name} ({columns}) SELECT {columns} FROM erasures WHERE NOT erased"
    )
    connection.exec_driver_sql("DROP TABLE erasures")
