"""The words that a catalog made of its documents: whose version they are, and the documents to make them of anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import sqlalchemy as sa

from bank_service.catalog.sql.tables import living, versions
from bank_service.catalog.sql.versions import Row
from bank_service.values.words import VERSION

logger = logging.getLogger(__name__)

FILLED_ROWS = 1_000  # documents in memory at once when all words are made anew


def words_version_in(metadata: sa.MetaData) -> sa.Table:
    """A table of one row, with the version of ``values.words`` that made all words."""
    return sa.Table(
        "words_version",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),  # always 1
        sa.Column("version", sa.Text, nullable=False),
    )


def are_current(connection: sa.Connection, words_version: sa.Table) -> bool:
    """Whether this version made the words. Where another one did, the log says so."""
    known = connection.execute(sa.select(words_version.c.version)).scalar_one_or_none()
    if known not in (None, VERSION):
        logger.info("making the words of all documents anew: they are of version %s, not %s", known, VERSION)
    return bool(known == VERSION)


def living_documents(connection: sa.Connection) -> Iterator[Row]:
    """All living documents with their texts, in the order of their changes. Writes may come in between."""
    columns, last = versions.c, 0
    chosen = (columns.began, columns.key, columns.id, columns.namespace, columns.title, columns.text)
    page = sa.select(*chosen).where(living).order_by(columns.began).limit(FILLED_ROWS)
    while rows := connection.execute(page.where(columns.began > last)).mappings().all():
        yield from rows
        last = rows[-1]["began"]


def note_version(connection: sa.Connection, words_version: sa.Table) -> None:
    """Notes that this version made all words."""
    connection.execute(sa.delete(words_version))
    connection.execute(sa.insert(words_version).values(id=1, version=VERSION))
