"""The words of documents, for BM25 with SQLite's FTS5. They lie in the catalog's file. The transaction that writes a
document writes its words.

``values.words`` makes the words, and FTS5 gets them with spaces in between.

Each namespace has its own table, because FTS5 computes its statistics per table. Examples are the number of documents
and their mean length. In one common table, scores would reveal the word counts of other namespaces.

The tables are contentless: to remove a document, FTS5 needs the same words again. So the catalog knows the version of
its words. If a bank of another version opens it, such as one with a newer Python, all tables are built anew.

FTS5 only marks a removed word, and keeps it until its segments are merged. ``WordCleaner`` merges them after removals.
The catalog's ``secure_delete`` then overwrites the old segments.
"""

from __future__ import annotations

import sqlalchemy as sa

from bank_service.catalog.sql.made_words import are_current, living_documents, note_version, words_version_in
from bank_service.catalog.sql.prepared import Prepared, run_text
from bank_service.catalog.sqlite.sqlite_tables import own_metadata
from bank_service.values.embedder import embedded_text
from bank_service.values.words import document_words

MERGE_PAGES = 200  # per step of a merge; a step takes the catalog's only writer some milliseconds

lexical_spaces = sa.Table(
    "lexical_spaces",
    own_metadata,
    sa.Column("number", sa.Integer, primary_key=True),  # of the FTS5 table
    sa.Column("namespace", sa.Text, nullable=False, unique=True),
    sa.Column("num_removed", sa.Integer, nullable=False),  # documents whose words are still in the table's segments
)

words_version = words_version_in(own_metadata)

_NUMBER = Prepared(sa.select(lexical_spaces.c.number).where(lexical_spaces.c.namespace == sa.bindparam("namespace")))
_COUNT_REMOVED = Prepared(
    sa.update(lexical_spaces)
    .where(lexical_spaces.c.namespace == sa.bindparam("space"))
    .values(num_removed=lexical_spaces.c.num_removed + 1)
)


def put_words(connection: sa.Connection, key: int, namespace: str, title: str, text: str) -> None:
    """Adds a document's words, so that searches find it."""
    table = table_of(connection, namespace) or _create(connection, namespace)
    values = (key, document_words(embedded_text(title, text)))
    run_text(connection, f"INSERT INTO {table}(rowid, text) VALUES (?, ?)", values)


def remove_words(connection: sa.Connection, key: int, namespace: str, title: str, text: str) -> None:
    """Removes a document's words. ``title`` and ``text`` must be the same as in ``put_words``."""
    table = table_of(connection, namespace)
    values = (key, document_words(embedded_text(title, text)))
    run_text(connection, f"INSERT INTO {table}({table}, rowid, text) VALUES ('delete', ?, ?)", values)
    _COUNT_REMOVED.run(connection, space=namespace)


def renew_words(connection: sa.Connection) -> None:
    """Builds all tables anew if another version made their words, in minutes for a million documents."""
    if not are_current(connection, words_version):
        fill_words(connection)


def fill_words(connection: sa.Connection) -> None:
    """Builds all tables anew from the documents, for a catalog of a schema without them or with other words."""
    for number in connection.execute(sa.select(lexical_spaces.c.number)).scalars().all():
        connection.exec_driver_sql(f"DROP TABLE {_name(number)}")
    connection.execute(sa.delete(lexical_spaces))
    for row in living_documents(connection):
        put_words(connection, row["key"], row["namespace"], row["title"], row["text"])
    note_version(connection, words_version)


def uncleaned(connection: sa.Connection) -> dict[int, int]:
    """Table number → number of removed documents, for tables that still hold their words."""
    columns = lexical_spaces.c
    # Below 0 where an older version counted removals twice.
    query = sa.select(columns.number, columns.num_removed).where(columns.num_removed != 0)
    return {int(number): int(count) for number, count in connection.execute(query)}


def clean_step(connection: sa.Connection, number: int, num_removed: int, *, first: bool) -> bool:
    """Merges some of a table's segments. True when all are merged and the words removed before are gone.

    The first step of a merge has ``first``, the others don't. The last step subtracts ``num_removed`` from the table's
    count. So a crash between the steps, or removals meanwhile, leave work for the next merge.
    """
    table = _name(number)
    before = _total_changes(connection)
    # A negative number merges all segments, of every level. The number of changes tells whether FTS5 did any work.
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
    connection.exec_driver_sql(f"CREATE VIRTUAL TABLE {table} USING fts5(text, content='', tokenize='ascii')")
    return table
