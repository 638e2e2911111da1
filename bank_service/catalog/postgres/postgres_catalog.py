"""The catalog in PostgreSQL. A change is acknowledged when the server has committed it durably.

The server's own vacuum frees the room of purged data. Its log and its backups keep them longer; see docs/storage.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.postgres.connect import error_name, reader_of, shown, writer_of
from bank_service.catalog.postgres.folder_mark import check_mark, check_no_gradients, mark
from bank_service.catalog.postgres.partitions import create_parent
from bank_service.catalog.postgres.postgres_search_rows import PostgresSearchRows
from bank_service.catalog.postgres.postgres_tables import last_commit, own_metadata
from bank_service.catalog.postgres.postgres_writer import PostgresWriter, take_lock
from bank_service.catalog.postgres.server_check import add_extension, check_schema, check_server, unreachable
from bank_service.catalog.postgres.vector_search import PostgresVectors
from bank_service.catalog.postgres.word_rows import PostgresWords, renew_words
from bank_service.catalog.sql import history
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.collection_row import open_collection
from bank_service.catalog.sql.prepared import Prepared
from bank_service.catalog.sql.sql_catalog import SqlCatalog
from bank_service.catalog.sql.tables import collection, metadata
from bank_service.errors import CatalogReadError
from bank_service.values.namespace_limits import LimitsOf, unlimited

_CODEC = Prepared(sa.select(collection.c.codec))


class PostgresCatalog(SqlCatalog):
    """One collection in one schema of a database; see ``contract.Catalog``."""

    _writer: PostgresWriter

    def __init__(
        self,
        url: str,
        folder: Path,
        identity: CollectionIdentity,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
    ) -> None:
        """Opens or creates. ``folder`` is the bank's, with its gradients.

        CollectionMismatchError where database or folder hold another collection, CatalogDamagedError, BankInUseError.
        RuntimeError where the server can't be reached or can't hold a catalog. ``history_seconds``: see
        ``history.seconds_kept``.
        """
        super().__init__(limits_of, PostgresSearchRows())
        writer = writer_of(url)
        sa.event.listen(writer, "connect", take_lock)
        try:
            with writer.begin() as connection:
                self.collection_id = self._open_collection(connection, url, folder, identity)
                renew_words(connection)
                self.history_seconds = history.seconds_kept(connection, history_seconds)
                check_mark(folder, self.collection_id, shown(url))
            mark(folder, self.collection_id)  # only now, because the collection is in the catalog
        except sa.exc.SQLAlchemyError as error:
            writer.dispose()
            raise unreachable(url, error) from error
        except BaseException:
            writer.dispose()
            raise
        self._engine = reader_of(url)
        self._writer = PostgresWriter(writer)
        self.words = PostgresWords()
        self.vectors = PostgresVectors(self._engine)

    def close(self) -> None:
        """Commits the queued writes, then closes."""
        self.vectors.stop()
        self._writer.close()
        self._engine.dispose()

    @contextmanager
    def view(self) -> Iterator[SqlView]:
        if self._writer.is_in_doubt:
            self._writer.settle()
            raise CatalogReadError("the catalog must be known, got a commit without an answer; try again")
        try:
            with self._begun() as connection:
                yield SqlView(connection, self._search_rows)
        except sa.exc.SQLAlchemyError as error:
            raise self._unreadable(error) from error

    def _reason(self, error: sa.exc.SQLAlchemyError) -> str:
        return error_name(error)

    def empty_log(self) -> Future[bool]:
        """True: the log is the server's own."""
        future: Future[bool] = Future()
        future.set_result(True)
        return future

    @contextmanager
    def _begun(self) -> Iterator[sa.Connection]:
        """A transaction that reads. A connection of the pool may be broken, so a new one has a second try."""
        with self._engine.connect() as connection:
            try:
                transaction = connection.begin()
            except sa.exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                transaction = None
            if transaction is not None:
                with transaction:
                    yield connection
                return
        with self._engine.begin() as connection:
            yield connection

    def _open_collection(self, connection: sa.Connection, url: str, folder: Path, identity: CollectionIdentity) -> str:
        check_server(connection, url)
        add_extension(connection, url)
        check_schema(connection, url)
        metadata.create_all(connection)
        own_metadata.create_all(connection)
        connection.execute(insert(last_commit).values(id=1, token="").on_conflict_do_nothing())
        create_parent(connection, identity.embedding_dimension)
        return open_collection(
            connection,
            identity,
            shown(url),
            check_new=lambda: check_no_gradients(folder, shown(url)),
            upgrade=lambda version: connection.execute(sa.select(collection)).mappings().one(),
        )


def stored_codec(url: str) -> str | None:
    """The collection's codec. None where there is no collection yet, or where it can't be read. ``PostgresCatalog``
    raises the reason."""
    engine = reader_of(url)
    try:
        with engine.begin() as connection:
            rows = _CODEC.rows(connection)
    except sa.exc.SQLAlchemyError:
        return None
    finally:
        engine.dispose()
    return str(rows[0][0]) if rows else None
