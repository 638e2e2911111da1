"""Opens the catalog. Other rooms reach the store only from here: SQLite, in one file of the bank's folder."""

from __future__ import annotations

from pathlib import Path

from bank_service.catalog.contract import Catalog
from bank_service.catalog.entries import CollectionIdentity
from bank_service.catalog.sqlite.catalog import SqliteCatalog
from bank_service.catalog.sqlite.catalog_file import (
    CATALOG_FILE,
    check_catalog,
    copy_catalog,
    describe_copy,
    stored_codec,
)
from bank_service.values.namespace_limits import LimitsOf, unlimited

__all__ = ["CATALOG_FILE", "check_catalog", "copy_catalog", "describe_copy", "open_catalog", "stored_codec"]


def open_catalog(
    data_dir: Path,
    identity: CollectionIdentity,
    limits_of: LimitsOf = unlimited,
    *,
    history_seconds: int | None = None,
) -> Catalog:
    """Opens or creates the catalog in a bank's folder. No other process may have it open.

    ``history_seconds`` is the time for which past versions are kept. None keeps the last setting, which is 0 at first.
    CollectionMismatchError where the folder holds another collection, CatalogDamagedError.
    """
    return SqliteCatalog(data_dir / CATALOG_FILE, identity, limits_of, history_seconds=history_seconds)
