"""The words of documents, for BM25 by SQLite's FTS5, in the catalog's own file and in each document's own transaction.

A table per namespace. FTS5's statistics (how many documents, how many have a word, their mean length) are a
table's: in one table for all, a namespace's scores would tell how often a word stands in another's documents.

The tables are contentless: a document is taken out by the words that its row in the catalog had. FTS5 keeps a word
that was taken out, and marks it, until its segments are merged; ``WordCleaner`` has that done after a change
that took something out, and the catalog's ``secure_delete`` overwrites what the merge leaves.
"""

from __future__ import annotations

import sqlalchemy as sa

from bank_service.catalog.sqlite.prepared import Prepared, run_text
from bank_service.catalog.sqlite.tables import living, metadata, versions
from bank_service.values.embedder import embedded_text

MERGE_PAGES = 200  # of one step of a merge: milliseconds in the catalog's one writer

lexical_spaces = sa.Table(
    "lexical_spaces",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),  # of the FTS5 table
    sa.Column("namespace", sa.Text, nullable=False, unique=True),
    sa.Column("num_removed", sa.Integer, nullable=False),  # documents whose words are still in the table's segments
)

_NUMBER = Prepared(sa.select(lexical_spaces.c.number).where(lexical_spaces.c.namespace == sa.bindparam("namespace")))
_COUNT_REMOVED = Prepared(
    sa.update(lexical_spaces)
    .where(lexical_spaces.c.namespace == sa.bindparam("space"))
    .values(num_removed=lexical_spaces.c.num_removed + 1)
)


def put_words(connection: sa.Connection, key: int, namespace: str, title: str, text: str) -> None:
    """Makes a document found by its words."""
    table = table_of(connection, namespace) or _create(connection, namespace)
    values = (key, embedded_text(title, text))
    run_text(connection, f"INSERT INTO {table}(rowid, text) VALUES (?, ?)", values)


def remove_words(connection: sa.Connection, key: int, namespace: str, title: str, text: str) -> None:
    """Takes a document out. ``title`` and ``text`` must be what was put."""
    table = table_of(connection, namespace)
    values = (key, embedded_text(title, text))
    run_text(connection, f"INSERT INTO {table}({table}, rowid, text) VALUES ('delete', ?, ?)", values)
    _COUNT_REMOVED.run(connection, space=namespace)


def fill_words(connection: sa.Connection) -> None:
    """Makes all tables from the documents: for a catalog that had none."""
    spaces = sa.select(versions.c.namespace).where(living).distinct()
    for namespace in connection.execute(spaces).scalars().all():
        table = _create(connection, namespace)
        copy = (
            f"INSERT INTO {table}(rowid, text) "
            "SELECT key, CASE title WHEN '' THEN text ELSE title || char(10) || text END "
            "FROM versions WHERE namespace = :namespace AND ended IS NULL AND NOT deleted"
        )
        connection.execute(sa.text(copy), {"namespace": namespace})


def uncleaned(connection: sa.Connection) -> dict[int, int]:
    """Tables that still hold words which were taken out: their numbers, and how many documents' words."""
    columns = lexical_spaces.c
    query = sa.select(columns.number, columns.num_removed).where(columns.num_removed > 0)
    return {int(number): int(count) for number, count in connection.execute(query)}


def clean_step(connection: sa.Connection, number: int, num_removed: int, *, first: bool) -> bool:
    """Merges some of a table's segments into one; true once all is merged, and what was taken out is gone.

    Begin with ``first``, then go on without. What is taken out meanwhile is left for the next time, and so is all
    where a crash comes between: ``num_removed`` is taken off the table's count by the last step.
    """
    table = _name(number)
    before = _total_changes(connection)
    # Negative: all segments, whatever their level. FTS5 says by the number of changes whether it did anything.
    pages = -MERGE_PAGES if first else MERGE_PAGES
    connection.exec_driver_sql(f"INSERT INTO {table}({table}, rank) VALUES ('merge', {pages})")
    if _total_changes(connection) - before >= 2:
        return False
    done = sa.update(lexical_spaces).where(lexical_spaces.c.number == number)
    connection.execute(done.values(num_removed=lexical_spaces.c.num_removed - num_removed))
    return True


def _total_changes(connection: sa.Connection) -> int:
    return int(connection.exec_driver_sql("SELECT total_changes()").scalar_one())


def table_of(connection: sa.Connection, namespace: str) -> str | None:
    """The FTS5 table of a namespace; None where it never had a document."""
    row = _NUMBER.one(connection, namespace=namespace)
    return None if row is None else _name(row["number"])


def _name(number: int) -> str:
    return f"lexical_{number}"


def _create(connection: sa.Connection, namespace: str) -> str:
    added = sa.insert(lexical_spaces).values(namespace=namespace, num_removed=0).returning(lexical_spaces.c.number)
    table = _name(int(connection.execute(added).scalar_one()))
    connection.exec_driver_sql(
        f"CREATE VIRTUAL TABLE {table} USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2')"
    )
    return table
