"""Ties a bank's folder to its catalog in PostgreSQL.

The folder has the gradients, and the first sweep removes those that the catalog doesn't name. So a folder must never
meet the catalog of another bank.
"""

from __future__ import annotations

import os
from pathlib import Path

from bank_service.errors import CatalogDamagedError, CollectionMismatchError

MARK_FILE = "catalog.id"  # has the collection's id
_BLOB_FOLDERS = "blobs/??/*"


def check_no_gradients(folder: Path, place: str) -> None:
    """CatalogDamagedError where the folder of a new catalog already has gradients."""
    if next(folder.glob(_BLOB_FOLDERS), None) is not None:
        raise CatalogDamagedError(
            f"the catalog {place} must name the gradients in {folder}, got an empty one; nothing was changed. Name the "
            "catalog of this folder, restore that database, or use another data directory"
        )


def check_mark(folder: Path, collection_id: str, place: str) -> None:
    """CollectionMismatchError where the folder belongs to another catalog. CatalogDamagedError where it belongs to none
    and has gradients."""
    file = folder / MARK_FILE
    known = file.read_text("utf-8").strip() if file.is_file() else ""
    if not known:
        check_no_gradients(folder, place)
    elif known != collection_id:
        raise CollectionMismatchError(
            f"{folder} belongs to the collection {known}, but the catalog {place} has {collection_id}; "
            "name the catalog of this folder, or use another data directory"
        )


def mark(folder: Path, collection_id: str) -> None:
    """The folder belongs to this catalog from now on. Durable on return, because gradients come next."""
    file = folder / MARK_FILE
    if file.is_file() and file.read_text("utf-8").strip():
        return
    with file.open("w", encoding="utf-8") as written:
        written.write(collection_id + "\n")
        written.flush()
        os.fsync(written.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
