"""Loads a new catalog from another one by COPY. Indexes come after the rows, because that is several times as fast."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from bank_service.catalog.postgres import partitions
from bank_service.catalog.postgres.connect import shown, writer_of
from bank_service.catalog.postgres.copy_rows import copy_rows
from bank_service.catalog.postgres.folder_mark import mark
from bank_service.catalog.postgres.membership import Membership
from bank_service.catalog.postgres.postgres_tables import own_metadata
from bank_service.catalog.postgres.server_check import add_extension, check_schema, check_server, unreachable
from bank_service.catalog.postgres.vector_search import BUILD_MEMORY
from bank_service.catalog.postgres.word_rows import fill_words
from bank_service.catalog.sql.erasures import pending_erasures
from bank_service.catalog.sql.prepared import run_text
from bank_service.catalog.sql.tables import collection, metadata, namespace_usage
from bank_service.catalog.sql.transfer import Rows, StoppedSqlCatalog, carry, compare
from bank_service.catalog.stopped import StoppedCatalog
from bank_service.errors import CollectionMismatchError

_LOCK_SETTINGS = (
    "SELECT current_setting('max_locks_per_transaction')::int, "
    "current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int"
)
# Of the transaction that loads, as counted in pg_locks. A partition has 5 for its tables, and 8 for its indexes.
LOCKS_PER_NAMESPACE = 13
OTHER_LOCKS = 300


def check_load(url: str, source: StoppedCatalog, collection_id: str) -> None:
    """Raises the errors of ``load`` at its beginning. RuntimeError also where the server can't have the locks for it.

    Changes nothing.
    """
    assert isinstance(source, StoppedSqlCatalog)
    count = sa.select(sa.func.count()).select_from(namespace_usage)
    num_namespaces = int(source.connection.execute(count).scalar_one())
    wanted = num_namespaces * LOCKS_PER_NAMESPACE + OTHER_LOCKS
    engine = _loader_of(url)
    try:
        with engine.connect() as connection, connection.begin() as transaction:
            _is_new(connection, url, collection_id)
            ((per_transaction, num_transactions),) = run_text(connection, _LOCK_SETTINGS)
            transaction.rollback()
    except sa.exc.SQLAlchemyError as error:
        raise unreachable(url, error) from error
    finally:
        engine.dispose()
    if wanted > per_transaction * num_transactions:
        raise RuntimeError(
            f"max_locks_per_transaction must be at least {-(-wanted // num_transactions)} in {shown(url)} to load "
            f"{num_namespaces:,} namespaces, got {per_transaction}; set it in postgresql.conf, and restart the server"
        )


def load(url: str, folder: Path, source: StoppedCatalog, collection_id: str) -> dict[str, int]:
    """Loads the catalog of the bank in ``folder``, whole or not at all. One that a killed load left is only compared.

    Returns the number of rows of each table. CollectionMismatchError where the schema has another catalog,
    CatalogDamagedError where the rows differ, BankInUseError. RuntimeError where the server can't be used.
    """
    assert isinstance(source, StoppedSqlCatalog)
    engine = _loader_of(url)
    try:
        with engine.begin() as connection:
            if _is_new(connection, url, collection_id):
                _fill(connection, source, collection_id)
            counts = compare(source, connection, collection_id)
    except (sa.exc.SQLAlchemyError, engine.dialect.loaded_dbapi.Error) as error:
        raise unreachable(url, error) from error
    finally:
        engine.dispose()
    mark(folder, collection_id)
    return counts


def _loader_of(url: str) -> sa.Engine:
    engine = writer_of(url)
    sa.event.listen(engine, "connect", Membership(is_shared=False).enter)
    return engine


def _is_new(connection: sa.Connection, url: str, collection_id: str) -> bool:
    """False where the catalog with this id is there. CollectionMismatchError for another one. RuntimeError where the
    database can't hold one."""
    check_server(connection, url)
    add_extension(connection, url)
    check_schema(connection, url)
    if not sa.inspect(connection).has_table(collection.name):
        return True
    known = connection.execute(sa.select(collection.c.uuid)).scalar_one_or_none()
    if known != collection_id:
        raise CollectionMismatchError(
            f"{shown(url)} must be without a catalog, it has the collection {known}; name another database or schema"
        )
    return False


def _fill(connection: sa.Connection, source: StoppedSqlCatalog, collection_id: str) -> None:
    connection.exec_driver_sql(f"SET LOCAL maintenance_work_mem = '{BUILD_MEMORY}'")
    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    tables = (*metadata.sorted_tables, *own_metadata.sorted_tables)
    for table in tables:
        connection.execute(sa.schema.CreateTable(table))
    partitions.create_bare_parent(connection, source.embedding_dimension)
    carry(source, collection_id, lambda table, rows: _copy(connection, table, rows))
    last = sa.select(sa.func.max(pending_erasures.c.number)).scalar_subquery()
    connection.execute(sa.select(sa.func.setval(f"{pending_erasures.name}_number_seq", last)))
    partitions.fill(connection, source)
    fill_words(connection, source.connection)
    for table in tables:
        for index in table.indexes:
            index.create(connection)
    partitions.add_indexes(connection)
    for name in ("versions", "vectors", "document_words"):
        connection.exec_driver_sql(f"ANALYZE {name}")


def _copy(connection: sa.Connection, table: sa.Table, rows: Rows) -> None:
    kinds = {column.name: column.type.compile(connection.dialect).split()[0].lower() for column in table.c}
    copy_rows(connection, table.name, kinds, rows)
