"""A catalog of an older schema becomes one of this, when it is opened."""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa

from bank_service.catalog.sqlite.attributes import fill_attributes
from bank_service.catalog.sqlite.history import fill_horizons
from bank_service.catalog.sqlite.lexical import fill_words
from bank_service.catalog.sqlite.tables import collection, documents, history

logger = logging.getLogger(__name__)

# 1 had no tables for filters and lexical retrieval, 2 none for past versions, 3 an index of digests alone.
SCHEMA_VERSION = 4


def upgrade(connection: sa.Connection, schema_version: int, path: Path) -> sa.RowMapping:
    """Whole or not at all, in the caller's transaction, where all tables are there. The collection's row."""
    for table in (documents, history):
        for index in table.indexes:
            index.create(connection, checkfirst=True)
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS ix_{table.name}_gradient_digest")
    if schema_version < 2:
        logger.info("making the tables for filters and lexical retrieval in %s; minutes for a million documents", path)
        fill_attributes(connection)
        fill_words(connection)
    if schema_version < 3:
        fill_horizons(connection)
    connection.execute(sa.update(collection).values(schema_version=SCHEMA_VERSION))
    return connection.execute(sa.select(collection)).mappings().one()
