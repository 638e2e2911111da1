"""The catalog in SQLite: WAL mode with synchronous=FULL, so that an acknowledged change survives a crash.

SQLite's own means erase purged data from the files. ``secure_delete`` overwrites deleted rows with zeros. FTS5 merges
its lists of words (``words.clean``). A checkpoint empties the write-ahead log (``empty_log``). Older copies, such as
snapshots, keep their content.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.sql import history
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.collection_row import open_collection
from bank_service.catalog.sql.prepared import run_text
from bank_service.catalog.sql.sql_catalog import SqlCatalog
from bank_service.catalog.sql.tables import metadata
from bank_service.catalog.sqlite.catalog_file import check_catalog, check_not_lost, damaged
from bank_service.catalog.sqlite.fts5_words import Fts5Words
from bank_service.catalog.sqlite.lexical import renew_words
from bank_service.catalog.sqlite.sqlite_search_rows import SqliteSearchRows
from bank_service.catalog.sqlite.sqlite_tables import own_metadata
from bank_service.catalog.sqlite.sqlite_writer import SqliteWriter
from bank_service.catalog.sqlite.upgrade import upgrade
from bank_service.errors import BankError
from bank_service.values.namespace_limits import LimitsOf, unlimited

CLOSE_SECONDS = 3.0


class SqliteCatalog(SqlCatalog):
    """One collection in one SQLite file; see ``contract.Catalog``."""

    vectors = None  # usearch has them
    _writer: SqliteWriter

    def __init__(
        self,
        path: Path,
        identity: CollectionIdentity,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
    ) -> None:
        """Opens or creates. CollectionMismatchError where the file holds another collection, CatalogDamagedError.

        ``history_seconds``: see ``history.seconds_kept``.
        """
        super().__init__(limits_of, SqliteSearchRows())
        if path.exists():
            check_catalog(path)
        self._engine = _engine(path)
        try:
            # The id belongs to the file. It stays the same when the content changes.
            self.collection_id = self._open_collection(path, identity)
            with self._engine.begin() as connection:  # only after the collection proved to be the caller's
                renew_words(connection)
                self.history_seconds = history.seconds_kept(connection, history_seconds)
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, sa.exc.DatabaseError) and not isinstance(error, sa.exc.OperationalError):
                raise damaged(path, str(error.orig)) from error
            raise
        # The writer needs its own connections. One that was opened while the disk was read-only can never write.
        self._writer = SqliteWriter(_engine(path))
        self.words = Fts5Words(self._writer)

    def close(self) -> None:
        """Commits the queued writes, then closes. It erases deleted words for a few seconds at most."""
        with contextlib.suppress(BankError):  # the disk may fail; the next start goes on
            self.words.clean_until(time.monotonic() + CLOSE_SECONDS)
        self._writer.close()
        self._engine.dispose()

    @contextmanager
    def view(self, at_least: int | None = None) -> Iterator[SqlView]:
        self._writer.wait_to_read()
        with super().view(at_least) as view:
            yield view

    def empty_log(self) -> Future[bool]:
        return self._writer.checkpoint()

    def _open_collection(self, path: Path, identity: CollectionIdentity) -> str:
        with self._engine.begin() as connection:
            metadata.create_all(connection)
            own_metadata.create_all(connection)
            return open_collection(
                connection,
                identity,
                str(path.parent),
                check_new=lambda: check_not_lost(path),
                upgrade=lambda version: upgrade(connection, version, path),
            )


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}",
        pool_size=8,
        max_overflow=-1,  # the number of reading threads bounds it
        connect_args={"check_same_thread": False, "timeout": 30.0},
        hide_parameters=True,  # parameters are texts of documents, which must not get into errors and logs
    )

    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # otherwise the driver commits by itself before some statements
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: sa.Connection) -> None:
        run_text(connection, "BEGIN")

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
    return engine
