"""The catalog's file: checks it, copies it while a bank writes, and reads a copy."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from bank_service.catalog.entries import CatalogCopy, StoredCollection
from bank_service.catalog.sql.collection_row import check_known
from bank_service.errors import CatalogDamagedError

CATALOG_FILE = "catalog.sqlite"
_BLOB_FOLDERS = "??/*"


def check_catalog(path: Path, mode: str = "mode=ro") -> None:
    """Checks the whole file, in 0.3 s for 100,000 documents if it is in the page cache. CatalogDamagedError where its
    pages don't fit together. ``mode``: of opening it."""
    with naming_damage(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as connection:
        found = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    if found != ["ok"]:
        raise damaged(path, " ".join("; ".join(found).split()))


def check_not_lost(path: Path) -> None:
    """CatalogDamagedError where the folder of a new catalog already has gradients.

    Then an earlier catalog is lost. The bank must not start, because its first sweep would remove every gradient.
    """
    if next((path.parent / "blobs").glob(_BLOB_FOLDERS), None) is not None:
        raise damaged(path, "it is missing or empty, but gradients of it are there")


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turns SQLite's error for a damaged file into a CatalogDamagedError. Errors of the disk stay as they are."""
    try:
        yield
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, reason: str) -> CatalogDamagedError:
    return CatalogDamagedError(
        f"the catalog {path} must be whole, got: {reason}; nothing was changed. Restore a snapshot into another folder "
        "(regrad restore SNAPSHOT --data-dir FOLDER), or, without one, ingest the documents anew into another folder"
    )


def copy_catalog(path: Path, target: Path) -> None:
    """Copies one committed state of a catalog into a separate file without a WAL. A bank may write meanwhile."""
    with (
        naming_damage(path),
        closing(sqlite3.connect(path, timeout=30.0)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)  # all pages in one step: readers of a WAL do not block its writer
        copy.execute("PRAGMA journal_mode=DELETE")
        copy.commit()


def describe_copy(path: Path) -> CatalogCopy:
    """The counts of a copy made by ``copy_catalog``. An older version may have made it."""
    with naming_damage(path), closing(sqlite3.connect(path)) as connection:
        query = f"SELECT gradient_digest, max(gradient_bytes) FROM ({_named(connection)}) GROUP BY 1 ORDER BY 1"
        gradients = {str(digest): int(size) for digest, size in connection.execute(query)}
        ((uuid, fingerprint, sequence),) = connection.execute(
            "SELECT uuid, learner_fingerprint, sequence FROM collection"
        )
    return CatalogCopy(uuid, fingerprint, sequence, gradients)


def stored_collection(path: Path) -> StoredCollection | None:
    """Reads the collection from a catalog's file, which may be of an older version.

    None where there is no collection yet, or where it can't be read. ``SqliteCatalog`` raises the reason.
    CollectionMismatchError for a newer version.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?{reading(path)}", uri=True)) as connection:
            row = connection.execute("SELECT schema_version, uuid, codec, sequence FROM collection").fetchone()
            if row is None:
                return None
            version, uuid, codec, sequence = row
            check_known(version, str(path.parent))
            has_gradients = connection.execute(_named(connection)).fetchone() is not None
            return StoredCollection(uuid, codec, sequence, has_gradients)
    except sqlite3.Error:
        return None


def _named(connection: sqlite3.Connection) -> str:
    """SQL: digest and bytes of each gradient that the catalog names, perhaps several times."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return " UNION ALL ".join(
        f"SELECT gradient_digest, gradient_bytes FROM {table} WHERE gradient_digest IS NOT NULL"
        for table in ("versions", "next_gradients", "documents", "history")  # the latter two of schemas before 5
        if table in tables
    )


def check_file(path: Path) -> None:
    """Raises the errors of a start for the file, if there is one: CatalogDamagedError, OSError. Changes nothing."""
    if not path.exists():
        return
    try:
        check_catalog(path, reading(path))
    except sqlite3.OperationalError as error:
        raise OSError(f"the catalog {path} must be readable, got: {error}") from error


def reading(path: Path) -> str:
    """The mode of reading a catalog that nobody writes meanwhile.

    SQLite makes files beside what it reads, unless it may rely on that. A running bank or a killed one has a log.
    Without ``mode=ro`` SQLite makes the file itself, too.
    """
    return "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
