"""A catalog of an older schema becomes one of this, when it is opened."""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa

from bank_service.attributes import fill_attributes
from bank_service.history import fill_horizons
from bank_service.lexical import fill_words
from bank_service.tables import collection, documents

logger = logging.getLogger(__name__)

# 1 had no tables for filters and lexical retrieval, 2 none for past versions.
SCHEMA_VERSION = 3


def upgrade(connection: sa.Connection, schema_version: int, path: Path) -> sa.RowMapping:
    """Whole or not at all, in the caller's transaction, where all tables are there. The collection's row."""
    if schema_version < 2:
        logger.info("making the tables for filters and lexical retrieval in %s; minutes for a million documents", path)
        for index in documents.indexes:
            index.create(connection, checkfirst=True)
        fill_attributes(connection)
        fill_words(connection)
    fill_horizons(connection)
    connection.execute(sa.update(collection).values(schema_version=SCHEMA_VERSION))
    return connection.execute(sa.select(collection)).mappings().one()
