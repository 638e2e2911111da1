"""The catalog in PostgreSQL. A change is acknowledged when the server has committed it durably.

The server's own vacuum frees the room of purged data. Its log and its backups keep them longer; see docs/storage.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy as sa

from bank_service.catalog.entries import CollectionIdentity, StoredCollection
from bank_service.catalog.postgres.connect import locks_of, name_for_log, reader_of, shown, state_of, writer_of
from bank_service.catalog.postgres.folder_mark import check_mark, check_no_gradients, mark
from bank_service.catalog.postgres.membership import STALE, Membership
from bank_service.catalog.postgres.partitions import create_parent
from bank_service.catalog.postgres.postgres_nodes import PostgresNodes
from bank_service.catalog.postgres.postgres_replica import PostgresReplica
from bank_service.catalog.postgres.postgres_search_rows import PostgresSearchRows
from bank_service.catalog.postgres.postgres_tables import own_metadata
from bank_service.catalog.postgres.postgres_writer import PostgresWriter
from bank_service.catalog.postgres.server_check import add_extension, check_schema, check_server, unreachable
from bank_service.catalog.postgres.vector_search import PostgresVectors
from bank_service.catalog.postgres.word_rows import PostgresWords, renew_words
from bank_service.catalog.sql import history
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.collection_row import check_known, open_collection
from bank_service.catalog.sql.prepared import Prepared
from bank_service.catalog.sql.sql_catalog import SqlCatalog
from bank_service.catalog.sql.tables import collection, metadata, next_gradients, versions
from bank_service.errors import CatalogReadError
from bank_service.values.catalog_url import ReplicaSettings
from bank_service.values.namespace_limits import LimitsOf, unlimited

_C = collection.c
_DIGEST, _NEXT = versions.c.gradient_digest, next_gradients.c.gradient_digest
_HAS_GRADIENTS = sa.exists().where(_DIGEST.is_not(None)) | sa.exists().where(_NEXT.is_not(None))
_COLLECTION = Prepared(sa.select(_C.schema_version, _C.uuid, _C.codec, _C.sequence, _HAS_GRADIENTS.label("has")))
_HAS_EPOCH = "SELECT to_regclass('epoch') IS NOT NULL"
_HAD_STORE = "SELECT EXISTS (SELECT 1 FROM epoch WHERE objects <> '')"
_UNDEFINED_TABLE = "42P01"


class PostgresCatalog(SqlCatalog):
    """One collection in one schema of a database; see ``contract.Catalog``."""

    nodes: PostgresNodes | None = None
    replica: PostgresReplica | None = None
    _writer: PostgresWriter

    def __init__(
        self,
        url: str,
        folder: Path,
        identity: CollectionIdentity,
        limits_of: LimitsOf = unlimited,
        *,
        history_seconds: int | None = None,
        is_shared: bool = False,
        replica: ReplicaSettings | None = None,
    ) -> None:
        """Opens or creates. ``folder`` is the bank's, with its gradients. ``is_shared``: they lie in an object store,
        so other banks may have the catalog, too.

        CollectionMismatchError where database or folder hold another collection, CatalogDamagedError, BankInUseError.
        RuntimeError where the server can't be reached or can't hold a catalog, and where ``replica`` is none of it.
        ``history_seconds``: see ``history.seconds_kept``.
        """
        super().__init__(limits_of, PostgresSearchRows())
        self._membership = Membership(is_shared=is_shared)
        writer = writer_of(url)
        sa.event.listen(writer, "connect", self._membership.enter)
        try:
            with writer.begin() as connection:
                self._open(connection, url, folder, identity, history_seconds)
                check_mark(folder, self.collection_id, shown(url))
            mark(folder, self.collection_id)  # only now, because the collection is in the catalog
            self._writer = PostgresWriter(writer, self._membership)
            if is_shared:
                self.nodes = PostgresNodes(self._writer, self._membership, locks_of(url), self.collection_id)
        except sa.exc.SQLAlchemyError as error:
            writer.dispose()
            raise unreachable(url, error) from error
        except BaseException:
            writer.dispose()
            raise
        self._engine = reader_of(url)
        self.words = PostgresWords()
        self.vectors = PostgresVectors(self._engine)
        if replica is not None:
            try:
                self.replica = PostgresReplica(replica, self._engine, self._search_rows)
            except BaseException as error:
                self.close()
                if isinstance(error, sa.exc.SQLAlchemyError):
                    raise unreachable(url, error) from error
                raise

    def close(self) -> None:
        """Commits the queued writes, then closes."""
        self.vectors.stop()
        if self.replica is not None:
            self.replica.close()
        self._writer.close()
        if self.nodes is not None:
            self.nodes.close()
        self._engine.dispose()

    @contextmanager
    def view(self, at_least: int | None = None) -> Iterator[SqlView]:
        if self._writer.is_in_doubt:
            self._writer.settle()
            raise CatalogReadError("the catalog must be known, got a commit without an answer; try again")
        if self._membership.is_stale:
            raise CatalogReadError(STALE)
        if at_least is not None and self.replica is not None:
            with self.replica.view(at_least) as view:
                if view is not None:
                    yield view
                    return
        try:
            with self._begun() as connection:
                yield SqlView(connection, self._search_rows)
        except sa.exc.SQLAlchemyError as error:
            raise self._unreadable(error) from error

    def _reason(self, error: sa.exc.SQLAlchemyError) -> str:
        return name_for_log(error)

    def finish_next(self) -> Future[bool]:
        finished = super().finish_next()
        if (replica := self.replica) is not None:
            finished.add_done_callback(lambda _: replica.leave_past())
        return finished

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

    def _open(
        self,
        connection: sa.Connection,
        url: str,
        folder: Path,
        identity: CollectionIdentity,
        history_seconds: int | None,
    ) -> None:
        check_server(connection, url)
        add_extension(connection, url)
        check_schema(connection, url)
        is_alone = self._membership.join(connection)
        metadata.create_all(connection)
        own_metadata.create_all(connection)
        create_parent(connection, identity.embedding_dimension)
        self.collection_id = open_collection(
            connection,
            identity,
            shown(url),
            check_new=lambda: check_no_gradients(folder, shown(url)),
            upgrade=lambda version: connection.execute(sa.select(collection)).mappings().one(),
            is_alone=is_alone,
        )
        renew_words(connection, is_alone=is_alone)
        self.history_seconds = history.seconds_kept(connection, history_seconds, is_alone=is_alone)
        self._membership.begin(connection, is_alone=is_alone)

    def _check_gradient(self, connection: sa.Connection, digest: str) -> None:
        if self.nodes is not None:
            self.nodes.check(connection, digest)

    def _drop_gradients(self, connection: sa.Connection, digests: Collection[str]) -> None:
        if self.nodes is not None:
            self.nodes.note_dropped(connection, digests)

    def _changing_settings(self, connection: sa.Connection) -> AbstractContextManager[None]:
        return self._membership.changing(connection)


def stored_collection(url: str) -> StoredCollection | None:
    """None where there is no collection yet. RuntimeError where it can't be read.
    CollectionMismatchError for one of a newer version."""
    engine = reader_of(url)
    try:
        with engine.begin() as connection:
            rows = _COLLECTION.rows(connection)
            had_store = all(connection.exec_driver_sql(asked).scalar_one() for asked in (_HAS_EPOCH, _HAD_STORE))
    except sa.exc.SQLAlchemyError as error:
        if state_of(error) == _UNDEFINED_TABLE:
            return None
        raise unreachable(url, error) from error
    finally:
        engine.dispose()
    if not rows:
        return None
    version, uuid, codec, sequence, has_gradients = rows[0]
    check_known(version, shown(url))
    return StoredCollection(uuid, codec, sequence, has_gradients or had_store)
