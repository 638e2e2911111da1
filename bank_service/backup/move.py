"""Carries a stopped bank to another place: another folder, a catalog in PostgreSQL or out of it, another object store.

The gradients go first, each checked against its digest at both ends. Then the catalog is made in one transaction, and
compared row by row before its commit. So the new bank has a catalog only once it has everything. Until the end,
MOVE_FILE in its folder keeps banks out, and a move again goes on where the last one ended.

The source is only read, but for its lock. The new bank gets an id of its own, because the two go different ways from
then on. So no folder, object store or snapshot of one of them is taken for the other's.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bank_service.backup.snapshot import BATCH, NUM_THREADS, Progress
from bank_service.blobs.blob_store import BlobStore
from bank_service.blobs.folder_objects import fsync_folder, write_durably
from bank_service.blobs.place import restored_blobs, stored_blobs
from bank_service.catalog.factory import CATALOG_FILE, MOVE_FILE, check_load, load_catalog, stopped_catalog
from bank_service.catalog.stopped import StoppedCatalog
from bank_service.errors import CollectionMismatchError, DataLossError
from bank_service.runtime.data_dir import DataDir
from bank_service.values.catalog_url import check_catalog_url, without_password
from bank_service.values.objects_url import check_objects_url

MOVED_FILE = "moved.json"  # the same as MOVE_FILE, once the move has ended


@dataclass(frozen=True, slots=True)
class BankPlace:
    """Where a bank keeps its catalog and its gradients."""

    data_dir: Path
    catalog: str | None = field(default=None, repr=False)  # postgresql:// URL; None: in the folder
    objects: str | None = None  # URL of the object store; None: the one that the folder names, or the folder

    @property
    def shown_catalog(self) -> str | None:
        return None if self.catalog is None else without_password(self.catalog)


@dataclass(frozen=True, slots=True)
class MoveProgress(Progress):
    """The state of a move."""

    sequence: int = 0  # of the last change
    num_rows: Mapping[str, int] = field(default_factory=dict)  # by table, once the move is done


def move(source: BankPlace, target: BankPlace) -> Iterator[MoveProgress]:
    """Moves a bank to a new place. The last report has ``num_rows``.

    CollectionMismatchError where the source is no bank, or where the target is neither new nor the part of an
    interrupted move of the same bank. BankInUseError where a bank runs at either place. CatalogDamagedError,
    DataLossError for a damaged gradient, UnavailableError and OSError where a store fails, RuntimeError where
    PostgreSQL can't be used. ValueError for a URL that can't be one.
    """
    for end, place in (("from", source), ("to", target)):
        if place.catalog is not None:
            check_catalog_url(place.catalog, f"--{end}-catalog")
        if place.objects is not None:
            check_objects_url(place.objects, f"--{end}-objects")
    _check_folders(source, target)
    with ExitStack() as stack:
        stack.enter_context(DataDir(source.data_dir).kept())
        owner = DataDir(target.data_dir)
        owner.take()
        stack.callback(owner.release)
        catalog = stack.enter_context(stopped_catalog(source.data_dir, source.catalog))
        _check_unmoved(target.data_dir, catalog)
        check_load(target.catalog, catalog, (_noted(target.data_dir / MOVE_FILE) or {}).get("to", ""))
        num_gradients = sum(map(len, catalog.gradients()))
        taken = stored_blobs(source.data_dir, source.objects, catalog.collection_id if num_gradients else None)
        collection_id = _begun(target.data_dir, catalog)
        given = restored_blobs(target.data_dir, target.objects, collection_id)
        progress = MoveProgress(num_gradients, 0, 0, 0, sequence=catalog.sequence)
        for progress in _copied(catalog, taken, given, num_gradients):
            yield progress
        num_rows = load_catalog(target.data_dir, target.catalog, catalog, collection_id)
        os.replace(target.data_dir / MOVE_FILE, target.data_dir / MOVED_FILE)
        fsync_folder(target.data_dir)
        yield MoveProgress(
            num_gradients, num_gradients, progress.num_copied, progress.copied_bytes,
            sequence=catalog.sequence, num_rows=num_rows,
        )  # fmt: skip


def _check_folders(source: BankPlace, target: BankPlace) -> None:
    folder = source.data_dir
    if not folder.is_dir():
        raise CollectionMismatchError(
            f"{folder} must be the folder of a bank, there is none; if it is lost and the gradients lie in an object "
            "store, make an empty one and name the store with --from-objects"
        )
    if source.catalog is None and next(folder.glob("catalog.*"), None) is None:
        raise CollectionMismatchError(f"{folder} must be the folder of a bank, it has no {CATALOG_FILE}")
    if target.data_dir.exists() and target.data_dir.samefile(folder):
        raise CollectionMismatchError(f"a bank must be moved into another folder, got {folder} for both")


def _noted(file: Path) -> dict[str, str] | None:
    """The collections of a move into the folder that has begun or ended, "from" and "to"."""
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return None


def _check_unmoved(folder: Path, source: StoppedCatalog) -> None:
    known = _noted(folder / MOVED_FILE)
    if known is not None and known["from"] == source.collection_id:
        raise CollectionMismatchError(
            f"the bank was moved to {folder} already; start it there, or move it once more into another folder"
        )


def _begun(folder: Path, source: StoppedCatalog) -> str:
    """Begins a move into a folder, or goes on with one. Returns the id of the new collection."""
    known = _noted(folder / MOVE_FILE)
    if known is None:
        found = sorted(path.name for path in folder.iterdir() if path.name != "lock")
        if found:
            raise CollectionMismatchError(
                f"{folder} must be absent or empty, it has {found[0]!r}; move the bank into another folder"
            )
        known = {"from": source.collection_id, "to": secrets.token_hex(16)}
        write_durably(folder / MOVE_FILE, json.dumps(known))
    elif known["from"] != source.collection_id:
        raise CollectionMismatchError(
            f"{folder} must be for the collection {source.collection_id}, it has part of {known['from']}; "
            "move the bank into another folder"
        )
    return str(known["to"])


def _copied(
    catalog: StoppedCatalog, source: BlobStore, target: BlobStore, num_gradients: int
) -> Iterator[MoveProgress]:
    num_done = num_copied = copied_bytes = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for page in catalog.gradients():
            for start in range(0, len(page), BATCH):
                batch = page[start : start + BATCH]
                sizes = list(pool.map(partial(_copy, source, target), batch))
                num_done += len(batch)
                num_copied += sum(size > 0 for size in sizes)
                copied_bytes += sum(sizes)
                yield MoveProgress(num_gradients, num_done, num_copied, copied_bytes, sequence=catalog.sequence)


def _copy(source: BlobStore, target: BlobStore, digest: str) -> int:
    """Copies one gradient and returns its bytes; 0 if it is there. A new copy is read again."""
    if target.is_sound(digest):
        return 0
    record = source.get(digest)
    with target.hold(digest):
        target.put(digest, record)
    if not target.is_sound(digest):
        raise DataLossError(
            f"gradient {digest} must be as it was written, it is not; move the bank again", digest=digest
        )
    return len(record)
