"""Restores the folder of a bank from a snapshot. It verifies every byte. The folder appears whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bank_service.backup.snapshot import BATCH, NUM_THREADS, Manifest, Progress, blob_name, file_digest
from bank_service.backup.target import open_target
from bank_service.blobs.blob_store import BlobStore
from bank_service.blobs.folder_objects import fsync_folder
from bank_service.blobs.objects import Objects
from bank_service.blobs.place import restored_blobs
from bank_service.catalog.factory import CATALOG_FILE, check_catalog, describe_copy
from bank_service.errors import SnapshotError
from bank_service.wire.record import record_digest


def restore(source: str, data_dir: Path, objects: str | None = None) -> Iterator[Progress]:
    """Restores into ``data_dir``, which must be absent or empty. ``objects``: URL of an empty object store for the
    gradients.

    SnapshotError names the damaged or missing part. CollectionMismatchError where the object store is not empty.
    OSError.
    """
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise SnapshotError(f"{data_dir} must be absent or an empty folder; restore into another and swap them")
    snapshot = open_target(source)
    manifest = Manifest.read(snapshot)
    if manifest is None:
        raise SnapshotError(
            f"{source} must be a whole snapshot, it has no manifest.json: it is none, or it was not finished; "
            "make it again, or name another"
        )
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{data_dir.name}.restoring-", dir=data_dir.parent))  # private to this user
    try:
        yield from _fill(snapshot, manifest, folder, objects)
        os.rename(folder, data_dir)
        fsync_folder(data_dir.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    yield Progress(
        manifest.num_gradients, manifest.num_gradients, manifest.num_gradients, manifest.gradient_bytes, manifest
    )


def _fill(snapshot: Objects, manifest: Manifest, folder: Path, objects: str | None) -> Iterator[Progress]:
    catalog = folder / CATALOG_FILE
    try:
        snapshot.get_file(manifest.catalog, catalog)
    except FileNotFoundError:
        raise SnapshotError(f"the snapshot must have its {manifest.catalog}, which is missing") from None
    if file_digest(catalog) != manifest.catalog_digest:
        raise SnapshotError(f"{manifest.catalog} must have the digest in its name, it is damaged")
    check_catalog(catalog)
    with catalog.open("rb") as file:
        os.fsync(file.fileno())
    sizes = describe_copy(catalog).gradients
    if hashlib.sha256("\n".join(sizes).encode()).hexdigest() != manifest.gradients_digest:
        raise SnapshotError("the snapshot's catalog must name the gradients of its manifest, it names others")
    blobs = restored_blobs(folder, objects, manifest.collection_id)
    copied_bytes = 0
    digests = list(sizes)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(digests), BATCH):
            batch = digests[start : start + BATCH]
            copied_bytes += sum(pool.map(lambda digest: _copy(snapshot, blobs, digest), batch))
            num_done = start + len(batch)
            yield Progress(len(sizes), num_done, num_done, copied_bytes)


def _copy(snapshot: Objects, blobs: BlobStore, digest: str) -> int:
    """Copies one gradient and returns its bytes."""
    try:
        record = snapshot.read(blob_name(digest))
    except FileNotFoundError:
        raise SnapshotError(f"the snapshot must have gradient {digest}, which is missing") from None
    if record_digest(record) != digest:
        raise SnapshotError(f"gradient {digest} of the snapshot must match its digest, it is damaged")
    with blobs.hold(digest):
        blobs.put(digest, record)
    return len(record)
