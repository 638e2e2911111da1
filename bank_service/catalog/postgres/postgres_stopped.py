"""A catalog in PostgreSQL that no bank has open, for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from bank_service.catalog.postgres.connect import shown, writer_of
from bank_service.catalog.postgres.folder_mark import check_mark
from bank_service.catalog.postgres.membership import Membership
from bank_service.catalog.postgres.postgres_search_rows import PostgresSearchRows
from bank_service.catalog.postgres.server_check import unreachable
from bank_service.catalog.sql.catalog_view import SqlView
from bank_service.catalog.sql.transfer import StoppedSqlCatalog


@contextmanager
def stopped(url: str, folder: Path) -> Iterator[StoppedSqlCatalog]:
    """Has the lock of the catalog meanwhile, so no bank opens it. ``folder`` is the bank's.

    CollectionMismatchError where there is no catalog, or another one than that of ``folder``. BankInUseError.
    RuntimeError where the server can't be used.
    """
    engine = writer_of(url)
    sa.event.listen(engine, "connect", Membership(is_shared=False).enter)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")  # it waits for gradients
            catalog = StoppedSqlCatalog(SqlView(connection, PostgresSearchRows()), shown(url))
            check_mark(folder, catalog.collection_id, shown(url))
            yield catalog
    except sa.exc.SQLAlchemyError as error:
        raise unreachable(url, error) from error
    finally:
        engine.dispose()
