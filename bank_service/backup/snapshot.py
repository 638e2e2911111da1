"""Snapshots of a whole bank: ``manifest.json``, ``catalog-<SHA-256>.sqlite``, ``blobs/ab/cdef…``.

The manifest is written last and names the catalog by its digest; the catalog names the gradients by theirs. So what
lies at a target is a whole snapshot, the one before or the new one, or none. A gradient that is there already, by its
name and size, is not copied again; what the new manifest does not need is removed after it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bank_service import __version__
from bank_service.backup.snapshot_store import SnapshotStore, open_store
from bank_service.blobs.blob_store import BlobStore
from bank_service.catalog.entries import CatalogCopy
from bank_service.catalog.factory import CATALOG_FILE, copy_catalog, describe_copy
from bank_service.errors import SnapshotError
from bank_service.runtime.data_dir import DataDir
from bank_service.runtime.ownership import Ownership

FORMAT = 1
MANIFEST = "manifest.json"
WORK_FOLDER = "snapshot.new"  # in the bank's folder, while a snapshot is written
BATCH = 64  # gradients copied between two reports of progress


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole snapshot says of itself."""

    format: int
    collection_id: str  # of the catalog's file
    learner_fingerprint: str
    sequence: int  # of the last change in it
    catalog_digest: str  # SHA-256 of the catalog's file
    catalog_bytes: int
    num_gradients: int
    gradient_bytes: int
    gradients_digest: str  # SHA-256 of the gradients' digests in order
    created_us: int  # microseconds since 1970
    version: str  # of the bank

    @property
    def catalog(self) -> str:
        """The name of its file."""
        return f"catalog-{self.catalog_digest}{Path(CATALOG_FILE).suffix}"

    @classmethod
    def read(cls, store: SnapshotStore) -> Manifest | None:
        """None where there is none. SnapshotError where it can't be read."""
        try:
            content = json.loads(store.read(MANIFEST))
            manifest = cls(**{field.name: content[field.name] for field in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise SnapshotError(
                f"{MANIFEST} must be a snapshot's manifest, got {type(error).__name__}: {error}"
            ) from error
        if manifest.format != FORMAT:
            raise SnapshotError(f"the snapshot's format must be {FORMAT}, got {manifest.format}; use its own version")
        return manifest


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a snapshot has come."""

    num_gradients: int  # in all
    num_done: int
    num_copied: int  # those that were not there before
    copied_bytes: int
    manifest: Manifest | None = None  # of the snapshot, once it is whole


class SnapshotWriter:
    """Writes one snapshot. ``close`` it, whatever happened. The caller keeps the gradients from being swept."""

    def __init__(self, data_dir: Path, blobs: BlobStore, target: str) -> None:
        """Takes the catalog as it is now. SnapshotError where ``target`` holds something else; OSError."""
        self._blobs = blobs
        self._store = open_store(target)
        self._folder = data_dir / WORK_FOLDER
        remove_leftovers(data_dir)
        self._folder.mkdir(mode=0o700)
        try:
            self._catalog = self._folder / CATALOG_FILE
            copy_catalog(data_dir / CATALOG_FILE, self._catalog)
            copy = describe_copy(self._catalog)
            self._sizes = copy.gradients
            self._manifest = _manifest(self._catalog, copy)
            self._there = self._store.sizes()
            self._check_target(target)
        except BaseException:
            self.close()
            raise
        self._num_copied = self._copied_bytes = self._num_done = 0

    def batches(self) -> Iterator[list[str]]:
        """The digests to ``copy``."""
        digests = list(self._sizes)
        for start in range(0, len(digests), BATCH):
            yield digests[start : start + BATCH]

    def copy(self, digests: Sequence[str]) -> Progress:
        """Copies those that are not there, each verified. DataLossError; may be called again with the same."""
        for digest in digests:
            name = blob_name(digest)
            path = self._blobs.path(digest)
            if self._there.get(name) != self._sizes[digest] or not self._store.is_sound(name, path, digest):
                self._copied_bytes += len(self._blobs.get(digest))
                self._store.put(name, path)
                self._there[name] = self._sizes[digest]
                self._num_copied += 1
        self._num_done += len(digests)
        return self._progress()

    def finish(self) -> Progress:
        """Makes the snapshot whole, then removes what belongs to none."""
        self._store.put(self._manifest.catalog, self._catalog)
        self._store.flush()
        self._store.write(MANIFEST, json.dumps(asdict(self._manifest), indent=1).encode())
        self._store.flush()
        wanted = {MANIFEST, self._manifest.catalog, *map(blob_name, self._sizes)}
        for name in self._there.keys() - wanted:
            self._store.remove(name)
        return self._progress(self._manifest)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _progress(self, manifest: Manifest | None = None) -> Progress:
        return Progress(len(self._sizes), self._num_done, self._num_copied, self._copied_bytes, manifest)

    def _check_target(self, target: str) -> None:
        strange = [name for name in self._there if not name.startswith(("blobs/", "catalog-", MANIFEST))]
        if strange:
            raise SnapshotError(f"{target} must be empty or a snapshot of this bank, got {strange[0]!r} in it")
        before = Manifest.read(self._store)
        if before is not None and before.collection_id != self._manifest.collection_id:
            raise SnapshotError(
                f"{target} must be empty or a snapshot of this bank, got one of collection {before.collection_id}; "
                "each bank needs a target of its own"
            )


def snapshot_folder(data_dir: Path, target: str) -> Iterator[Progress]:
    """Writes a snapshot of a bank that does not run. BankInUseError where it does; as ``SnapshotWriter``."""
    if not (data_dir / CATALOG_FILE).is_file():
        raise SnapshotError(
            f"{data_dir} must be the folder of a bank, it has no {CATALOG_FILE}; name it with --data-dir, or a running "
            "bank with --bank"
        )
    owner: Ownership = DataDir(data_dir)
    owner.take()
    try:
        with closing(SnapshotWriter(data_dir, BlobStore(data_dir / "blobs"), target)) as writer:
            for digests in writer.batches():
                yield writer.copy(digests)
            yield writer.finish()
    finally:
        owner.release()


def remove_leftovers(data_dir: Path) -> None:
    """What a snapshot that was killed left in the bank's folder. No snapshot may be under way."""
    shutil.rmtree(data_dir / WORK_FOLDER, ignore_errors=True)


def blob_name(digest: str) -> str:
    """A gradient's name in a snapshot."""
    return f"blobs/{digest[:2]}/{digest[2:]}"


def _manifest(catalog: Path, copy: CatalogCopy) -> Manifest:
    return Manifest(
        format=FORMAT,
        collection_id=copy.collection_id,
        learner_fingerprint=copy.learner_fingerprint,
        sequence=copy.sequence,
        catalog_digest=file_digest(catalog),
        catalog_bytes=catalog.stat().st_size,
        num_gradients=len(copy.gradients),
        gradient_bytes=sum(copy.gradients.values()),
        gradients_digest=hashlib.sha256("\n".join(copy.gradients).encode()).hexdigest(),
        created_us=time.time_ns() // 1000,
        version=__version__,
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
