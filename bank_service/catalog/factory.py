"""The one door to the store behind a bank's catalog: SQLite, in one file of the bank's folder."""

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
    """Opens or creates the catalog of a bank's folder, which nobody else may have open.

    ``history_seconds``: how long past versions are kept; None: as it was said last, at first not at all.
    CollectionMismatchError where the folder holds another collection, CatalogDamagedError.
    """
    return SqliteCatalog(data_dir / CATALOG_FILE, identity, limits_of, history_seconds=history_seconds)
