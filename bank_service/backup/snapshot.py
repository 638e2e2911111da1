"""Snapshots of a whole bank: ``manifest.json``, ``catalog-<SHA-256>.sqlite``, ``blobs/ab/cdef…``.

The manifest is written last. It names the catalog by its digest, and the catalog names the gradients by theirs. So the
target always has a whole snapshot, the old one or the new one, once it has had one. A gradient that is there already,
with its name and size, is not copied again. After the manifest, the writer removes the files that the manifest does not
need.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bank_service import __version__
from bank_service.backup.target import open_target
from bank_service.blobs.blob_store import BlobStore, name_of
from bank_service.blobs.objects import Objects
from bank_service.blobs.place import stored_blobs
from bank_service.catalog.entries import CatalogCopy
from bank_service.catalog.factory import CATALOG_FILE, copy_catalog, describe_copy
from bank_service.errors import SnapshotError
from bank_service.runtime.data_dir import DataDir
from bank_service.runtime.ownership import Ownership
from bank_service.wire.record import record_digest

FORMAT = 1
MANIFEST = "manifest.json"
WORK_FOLDER = "snapshot.new"  # in the bank's folder, while a snapshot is written
BATCH = 64  # gradients copied between two reports of progress
NUM_THREADS = 8  # that copy a batch, because an object store answers late
# The files of a snapshot, and the unfinished ones of a killed writer: ``blobs/new/…``, and ``….new`` of older versions.
_OWN_NAMES = re.compile(
    r"(manifest\.json|catalog-[0-9a-f]{64}\.sqlite|blobs/[0-9a-f]{2}/[0-9a-f]{62})(\.new)?|blobs/new/[0-9]+"
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a whole snapshot, in ``manifest.json``."""

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
        """The name of the catalog's file."""
        return f"catalog-{self.catalog_digest}{Path(CATALOG_FILE).suffix}"

    @classmethod
    def read(cls, target: Objects) -> Manifest | None:
        """Reads the manifest of a snapshot; None where there is none. SnapshotError where it is malformed."""
        try:
            content = json.loads(target.read(MANIFEST))
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

    def write(self, target: Objects) -> None:
        """Writes the manifest, which makes the snapshot whole. The files that it names must be durable before."""
        target.put(MANIFEST, json.dumps(asdict(self), indent=1).encode())


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a snapshot that is being written."""

    num_gradients: int  # in all
    num_done: int
    num_copied: int  # gradients that the target did not have
    copied_bytes: int
    manifest: Manifest | None = None  # once the snapshot is whole


class SnapshotWriter:
    """Writes one snapshot. Always ``close`` it. The caller must hold all gradients until then."""

    def __init__(self, data_dir: Path, blobs: BlobStore, target: str) -> None:
        """Copies the catalog as it is now. SnapshotError where ``target`` holds other files; OSError."""
        self._blobs = blobs
        self._target = open_target(target)
        self._folder = data_dir / WORK_FOLDER
        remove_leftovers(data_dir)
        self._folder.mkdir(mode=0o700)
        try:
            self._catalog = self._folder / CATALOG_FILE
            copy_catalog(data_dir / CATALOG_FILE, self._catalog)
            copy = describe_copy(self._catalog)
            self._sizes = copy.gradients
            self._manifest = _manifest(self._catalog, copy)
            self._there = self._look(target)
        except BaseException:
            self.close()
            raise
        self._num_copied = self._copied_bytes = self._num_done = 0

    def batches(self) -> Iterator[list[str]]:
        """The digests for ``copy``, in groups."""
        digests = list(self._sizes)
        for start in range(0, len(digests), BATCH):
            yield digests[start : start + BATCH]

    def copy(self, digests: Sequence[str]) -> Progress:
        """Verifies and copies the gradients that the target lacks. DataLossError: repair that gradient, then call again
        with the same digests."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for digest, num_bytes in zip(digests, pool.map(self._copied, digests), strict=True):
                self._there[blob_name(digest)] = self._sizes[digest]
                self._num_copied += num_bytes > 0
                self._copied_bytes += num_bytes
        self._num_done += len(digests)
        return self._progress()

    def finish(self) -> Progress:
        """Makes the snapshot whole, then removes the files that do not belong to it."""
        self._target.put_file(self._manifest.catalog, self._catalog)
        wanted = {self._manifest.catalog, *map(blob_name, self._sizes)}
        self._target.sync(wanted)
        self._manifest.write(self._target)
        for name in self._there.keys() - wanted - {MANIFEST}:
            with suppress(FileNotFoundError):
                self._target.remove(name)
        return self._progress(self._manifest)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_there(self, digest: str) -> bool:
        name = blob_name(digest)
        if self._there.get(name) != self._sizes[digest]:
            return False
        own, copy = self._blobs.path(digest), self._target.path(name)
        if copy is None:
            return True  # a remote store verifies its own objects
        # A linked copy is the bank's own file, which the bank verifies. A repair writes a new file, so the link ends.
        is_linked = own is not None and own.exists() and own.samefile(copy)
        return is_linked or record_digest(copy.read_bytes()) == digest

    def _copied(self, digest: str) -> int:
        """Copies a gradient that the target lacks, and returns its bytes; 0 if it is there."""
        if self._is_there(digest):
            return 0
        name, path = blob_name(digest), self._blobs.path(digest)
        record = self._blobs.get(digest)
        if path is None:
            self._target.put(name, record)
        else:
            self._target.put_file(name, path)
        return len(record)

    def _progress(self, manifest: Manifest | None = None) -> Progress:
        return Progress(len(self._sizes), self._num_done, self._num_copied, self._copied_bytes, manifest)

    def _look(self, target: str) -> dict[str, int]:
        """Name → bytes of each file at the target. SnapshotError where they are no snapshot of this bank."""
        found: dict[str, int] = {}
        for name, size in self._target.sizes():
            if not _OWN_NAMES.fullmatch(name):  # a file of somebody else: look no further
                raise SnapshotError(f"{target} must be empty or a snapshot of this bank, got {name!r} in it")
            found[name] = size
        before = Manifest.read(self._target)
        if before is not None and before.collection_id != self._manifest.collection_id:
            raise SnapshotError(
                f"{target} must be empty or a snapshot of this bank, got one of collection {before.collection_id}; "
                "each bank needs a target of its own"
            )
        return found


def snapshot_folder(data_dir: Path, target: str) -> Iterator[Progress]:
    """Writes a snapshot of a stopped bank. BankInUseError where the bank runs; the errors of ``SnapshotWriter``."""
    if not (data_dir / CATALOG_FILE).is_file():
        raise SnapshotError(
            f"{data_dir} must be the folder of a bank, it has no {CATALOG_FILE}; name it with --data-dir, or a running "
            "bank with --bank (a bank with its catalog in PostgreSQL takes no snapshots: see docs/backup.md)"
        )
    owner: Ownership = DataDir(data_dir)
    owner.take()
    try:
        with closing(SnapshotWriter(data_dir, stored_blobs(data_dir), target)) as writer:
            for digests in writer.batches():
                yield writer.copy(digests)
            yield writer.finish()
    finally:
        owner.release()


def remove_leftovers(data_dir: Path) -> None:
    """Removes the files that a killed snapshot left in the bank's folder. No snapshot may be under way."""
    shutil.rmtree(data_dir / WORK_FOLDER, ignore_errors=True)


def blob_name(digest: str) -> str:
    """A gradient's name in a snapshot."""
    return f"blobs/{name_of(digest)}"


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
