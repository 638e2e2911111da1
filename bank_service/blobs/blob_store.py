"""Immutable gradient records, named by their SHA-256.

A record is durable when ``put`` returns. It stays as long as a catalog row names it or an ingest holds it. Every other
record is an orphan, and a sweep removes it.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from bank_service.blobs.claim import Claim
from bank_service.blobs.folder_objects import FolderObjects
from bank_service.blobs.objects import ObjectBusyError, Objects, ObjectsUnavailableError
from bank_service.errors import DataLossError, UnavailableError
from bank_service.runtime.holds import Holds, Removal
from bank_service.wire.record import record_digest

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Errors of a read that do not tell about the file: too many open files, no memory, or no permission.
_NOT_THE_DISK = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}
LOOK_BATCH = 256  # digests looked up in the catalog at once

References = Callable[[list[str]], Set[str]]  # returns those of the digests that the catalog names


@dataclass(slots=True)
class Sweep:
    """The result of one sweep."""

    num_removed: int = 0
    unwanted: set[str] = field(default_factory=set)  # neither held nor referenced; some may have no record
    spared: set[str] = field(default_factory=set)  # unwanted, but kept because somebody holds all records
    failed: dict[str, OSError] = field(default_factory=dict)  # unwanted, but their records could not be removed
    outage: OSError | None = None  # after it, the store was asked no more


class BlobStore:
    """Records in a store of objects, for any number of threads. The digest ``abcdef…`` has the name ``ab/cdef…``."""

    def __init__(self, objects: Objects, claim: Claim | None = None, holds: Holds | None = None) -> None:
        """``claim`` is asked before removals. ``holds``: those of all processes that use the store; None: only this one
        does."""
        self._objects = objects
        self._claim = claim
        self._holds = holds or Holds()
        self._damaged: set[str] = set()  # digests whose records a read found to be corrupt

    @classmethod
    def in_folder(cls, folder: Path) -> BlobStore:
        """Opens or creates a store. It removes half-written files of an earlier process."""
        return cls(objects_in(folder))

    def hold(self, digest: str) -> AbstractContextManager[None]:
        """Keeps the record from sweeps until the catalog names it. A sweep under way is not waited for here, but in
        ``put``."""
        return self._holds.hold(digest)

    def hold_all(self) -> AbstractContextManager[None]:
        """Keeps all records from sweeps. ``take_spared`` gives afterwards the records to sweep again."""
        return self._holds.hold_all()

    @property
    def is_remote(self) -> bool:
        """The records have no files on this machine."""
        return self._objects.path("") is None

    @property
    def is_taken(self) -> bool:
        """Another process has opened the store, so this one removes no records."""
        return self._claim is not None and self._claim.is_lost

    def keep(self) -> None:
        """Keeps the claim to the store. Call it often. OSError, CatalogReadError."""
        if self._claim is not None:
            self._claim.keep()

    def close(self) -> None:
        """Call it before the catalog is closed. OSError, CatalogReadError."""
        if self._claim is not None:
            self._claim.close()

    @property
    def is_holding_all(self) -> bool:
        """Somebody holds all records."""
        return self._holds.is_holding_all

    def take_spared(self) -> set[str]:
        """The digests that sweeps spared since the last call, because somebody held all records."""
        return self._holds.take_spared()

    def put(self, digest: str, record: bytes) -> None:
        """Makes the record durable. Writes nothing where a sound copy is there. Call it inside ``hold``. OSError,
        UnavailableError."""
        name = name_of(digest)
        self._holds.wait_removed(digest)
        if self._objects.add(name, record):
            pass
        elif self.is_sound(digest):
            self._objects.sync([name])  # its first writer may not have synced it yet
        else:
            self._objects.put(name, record)
        self._damaged.discard(digest)

    def get(self, digest: str) -> bytes:
        """The record, checked against its digest. DataLossError where it is missing or corrupt. UnavailableError where
        the store does not tell."""
        try:
            record = self._objects.read(name_of(digest))
        except FileNotFoundError:
            raise DataLossError(
                f"gradient {digest} is missing from the blob store; ingest its document again", digest=digest
            ) from None
        except ObjectsUnavailableError as error:
            raise UnavailableError(f"gradient {digest} can't be read now: {error}") from error
        except OSError as error:
            if error.errno in _NOT_THE_DISK:
                raise
            raise DataLossError(
                f"gradient {digest} can't be read from the blob store ({error}); ingest its document again",
                digest=digest,
            ) from error
        if record_digest(record) != digest:
            self._damaged.add(digest)
            raise DataLossError(
                f"gradient {digest} is corrupt in the blob store; ingest its document again", digest=digest
            )
        return record

    def is_sound(self, digest: str) -> bool:
        """The record is there and matches its digest. UnavailableError where the store does not tell."""
        try:
            self.get(digest)
        except DataLossError:
            return False
        return True

    def is_stored(self, digest: str, num_bytes: int) -> bool:
        """The record is there, as far as one can tell without moving it over a network. UnavailableError.

        In a folder this is ``is_sound``. In an object store only the size is compared, unless a read has found the
        record to be corrupt.
        """
        if not self.is_remote or digest in self._damaged:
            return self.is_sound(digest)
        try:
            return self._objects.size(name_of(digest)) == num_bytes
        except FileNotFoundError:
            return False
        except ObjectsUnavailableError as error:
            raise UnavailableError(f"gradient {digest} can't be looked for now: {error}") from error

    def sweep(self, references: References, digests: Iterable[str] | None = None) -> Sweep:
        """Removes those of ``digests`` that are neither held nor referenced. None stands for all records. OSError where
        the records can't be listed. UnavailableError where other processes can't be asked."""
        sweep = Sweep()
        for batch in _batches(digests if digests is not None else self._digests(), self._holds.batch_size):
            with self._holds.removing(batch, references) as removal:
                sweep.unwanted |= removal.unwanted
                sweep.spared |= removal.spared
                sweep.failed.update({digest: _not_now(digest) for digest in removal.busy})
                for digest in removal.going:
                    self._remove(digest, sweep, removal)
        return sweep

    def orphans(self, references: References) -> set[str]:
        """All records that are not referenced, held ones too. Removes none. OSError where they can't be listed."""
        return {digest for batch in _batches(self._digests(), LOOK_BATCH) for digest in set(batch) - references(batch)}

    def path(self, digest: str) -> Path | None:
        """The path of the record's file, whether it exists or not. None where the store has no files."""
        return self._objects.path(name_of(digest))

    def _remove(self, digest: str, sweep: Sweep, removal: Removal) -> None:
        if sweep.outage is not None:
            sweep.failed[digest] = sweep.outage
            return
        try:
            if self._claim is not None:
                self._claim.check()
            if time.monotonic() > removal.until:
                raise _not_now(digest)
        except OSError as error:
            sweep.failed[digest] = sweep.outage = error
            return
        try:
            self._objects.remove(name_of(digest))
            sweep.num_removed += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            sweep.failed[digest] = error
            if isinstance(error, ObjectsUnavailableError):
                sweep.outage = error
                removal.doubtful.add(digest)

    def _digests(self) -> Iterator[str]:
        for name in self._objects.list():
            digest = name.replace("/", "", 1)
            if _DIGEST.fullmatch(digest) and name_of(digest) == name:
                yield digest


def objects_in(folder: Path) -> FolderObjects:
    """A folder of records, made if it is absent. Half-written files of an earlier process are removed."""
    objects = FolderObjects(folder, "tmp")
    objects.remove_unfinished()
    objects.add_folders(f"{byte:02x}" for byte in range(256))
    return objects


def _not_now(digest: str) -> ObjectBusyError:
    return ObjectBusyError(f"gradient {digest} must be left alone now, another node may be writing it")


def _batches(digests: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(digests)
    while batch := list(islice(rest, size)):
        yield batch


def name_of(digest: str) -> str:
    """A record's name among objects. ValueError for a name that is no digest."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"digest must be 64 lower-case hex digits, got {digest[:80]!r}")
    return f"{digest[:2]}/{digest[2:]}"
