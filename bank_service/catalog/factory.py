"""Opens the catalog: SQLite in the bank's folder, or PostgreSQL. Other rooms reach both stores only from here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity, StoredCollection
from bank_service.catalog.postgres import bulk_load, postgres_stopped
from bank_service.catalog.postgres.connect import shown
from bank_service.catalog.postgres.database_check import database_states
from bank_service.catalog.postgres.folder_mark import MARK_FILE, check_mark
from bank_service.catalog.postgres.postgres_catalog import PostgresCatalog
from bank_service.catalog.postgres.postgres_catalog import stored_collection as stored_in_postgres
from bank_service.catalog.postgres.replica_check import check_replica, replica_state
from bank_service.catalog.postgres.server_check import check_free
from bank_service.catalog.sqlite import sqlite_stopped
from bank_service.catalog.sqlite.catalog import SqliteCatalog
from bank_service.catalog.sqlite.catalog_file import (
    CATALOG_FILE,
    check_catalog,
    check_file,
    check_not_lost,
    copy_catalog,
    describe_copy,
)
from bank_service.catalog.sqlite.catalog_file import stored_collection as stored_in_sqlite
from bank_service.catalog.stopped import StoppedCatalog
from bank_service.errors import CollectionMismatchError
from bank_service.values.catalog_url import ReplicaSettings
from bank_service.values.namespace_limits import LimitsOf, unlimited

__all__ = [
    "CATALOG_FILE",
    "MOVE_FILE",
    "check_catalog",
    "check_folder",
    "check_place",
    "check_readable",
    "check_stored",
    "copy_catalog",
    "database_states",
    "describe_copy",
    "load_catalog",
    "open_catalog",
    "replica_state",
    "stopped_catalog",
    "stored_collection",
]

MOVE_FILE = "move.json"  # in a bank's folder while the bank is moved into it


def open_catalog(
    data_dir: Path,
    identity: CollectionIdentity,
    limits_of: LimitsOf = unlimited,
    *,
    history_seconds: int | None = None,
    url: str | None = None,
    is_shared: bool = False,
    replica: ReplicaSettings | None = None,
) -> Catalog:
    """Opens or creates the catalog in a bank's folder, or in PostgreSQL at ``url``. No other bank may have it open.

    ``is_shared``: in PostgreSQL other banks may, because the gradients of all lie in one object store.

    ``history_seconds`` is the time for which past versions are kept. None keeps the last setting, which is 0 at first.
    CollectionMismatchError where folder or database hold another collection, CatalogDamagedError. With a URL also
    BankInUseError, and RuntimeError where the server can't be used, or where ``replica`` is no replica of it.
    """
    check_folder(data_dir, url)
    if url is not None:
        return PostgresCatalog(
            url, data_dir, identity, limits_of, history_seconds=history_seconds, is_shared=is_shared, replica=replica
        )
    return SqliteCatalog(data_dir / CATALOG_FILE, identity, limits_of, history_seconds=history_seconds)


def stored_collection(data_dir: Path, url: str | None = None) -> StoredCollection | None:
    """None where there is no collection yet, or where the folder's can't be read: ``open_catalog`` raises the reason.
    CollectionMismatchError for one of a newer version. RuntimeError where the one in PostgreSQL can't be read."""
    return stored_in_sqlite(data_dir / CATALOG_FILE) if url is None else stored_in_postgres(url)


def check_readable(data_dir: Path, url: str | None = None) -> StoredCollection | None:
    """The stored collection. None where there is none yet. CatalogDamagedError, OSError or RuntimeError where it can't
    be read, CollectionMismatchError for one of a newer version. Changes nothing."""
    if url is None:
        check_file(data_dir / CATALOG_FILE)
    return stored_collection(data_dir, url)


def check_place(
    data_dir: Path, url: str | None = None, *, is_shared: bool = False, replica_url: str | None = None
) -> None:
    """CollectionMismatchError where the folder's catalog is elsewhere. With a URL also BankInUseError, and RuntimeError
    where the server or its replica can't be used. Changes nothing. ``is_shared``: see ``open_catalog``."""
    check_folder(data_dir, url)
    if url is not None:
        check_free(url, is_shared=is_shared)
        if replica_url is not None:
            check_replica(url, replica_url)


def stopped_catalog(data_dir: Path, url: str | None = None) -> AbstractContextManager[StoppedCatalog]:
    """Reads the catalog of a stopped bank, whose folder the caller owns. Changes nothing.

    CollectionMismatchError where there is none, where the folder's catalog is elsewhere, or for one of another version.
    CatalogDamagedError. With a URL also BankInUseError, and RuntimeError where the server can't be used.
    """
    check_folder(data_dir, url, "--from-catalog")
    if url is not None:
        return postgres_stopped.stopped(url, data_dir)
    return sqlite_stopped.stopped(data_dir / CATALOG_FILE)


def check_load(url: str | None, source: StoppedCatalog, collection_id: str) -> None:
    """Raises the errors of ``load_catalog`` at its beginning for a server in PostgreSQL. RuntimeError also where it
    must be set up for more namespaces. Changes nothing. ``collection_id``: of a move that goes on, or empty."""
    if url is not None:
        bulk_load.check_load(url, source, collection_id)


def load_catalog(data_dir: Path, url: str | None, source: StoppedCatalog, collection_id: str) -> dict[str, int]:
    """Makes the catalog of a new bank with the rows of another one, whole or not at all. One that an earlier call with
    this ``collection_id`` made is compared or replaced.

    Returns the number of rows of each table. CatalogDamagedError where the rows differ. With a URL also
    CollectionMismatchError where a catalog is there, BankInUseError, and RuntimeError where the server can't be used.
    """
    if url is not None:
        return bulk_load.load(url, data_dir, source, collection_id)
    return sqlite_stopped.load(data_dir / CATALOG_FILE, source, collection_id)


def check_stored(data_dir: Path, url: str | None, stored: StoredCollection | None) -> None:
    """CollectionMismatchError where the folder belongs to another catalog than this one. CatalogDamagedError where
    it is lost. Changes nothing."""
    if url is not None:
        check_mark(data_dir, "none" if stored is None else stored.collection_id, shown(url))
    elif stored is None:
        check_not_lost(data_dir / CATALOG_FILE)


def check_folder(data_dir: Path, url: str | None, flag: str = "--catalog") -> None:
    """CollectionMismatchError where the folder's catalog is elsewhere than at the ``url`` of ``flag``, or where a move
    into it was interrupted."""
    if (data_dir / MOVE_FILE).is_file():
        raise CollectionMismatchError(
            f"the bank must be in {data_dir} as a whole, but its move there was interrupted; run that `regrad move` "
            "again"
        )
    if url is None and (data_dir / MARK_FILE).is_file():
        raise CollectionMismatchError(
            f"the bank in {data_dir} has its catalog in PostgreSQL; name it with {flag}, or use another data directory"
        )
    if url is not None and (data_dir / CATALOG_FILE).is_file():
        raise CollectionMismatchError(
            f"the bank in {data_dir} has its catalog in {CATALOG_FILE} there; leave {flag} out, or use another data "
            "directory"
        )
