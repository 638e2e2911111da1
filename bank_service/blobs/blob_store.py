"""Immutable gradient records as files named by their SHA-256.

A record is durable when ``put`` returns. It belongs to the store as long as a catalog row names it or an
ingest holds it; everything else is an orphan and is swept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from bank_service.errors import DataLossError
from bank_service.wire.codec import record_digest

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Errors of a read that say nothing of the file: too many open, or not allowed.
_NOT_THE_DISK = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}
SWEEP_BATCH = 256  # digests looked up in the catalog at once

References = Callable[[list[str]], Set[str]]  # which of these digests the catalog names


@dataclass(slots=True)
class Sweep:
    """What came of one sweep."""

    num_removed: int = 0
    unwanted: set[str] = field(default_factory=set)  # neither held nor referenced, whether there was a file or not
    spared: set[str] = field(default_factory=set)  # of these, because all are to be kept for now
    failed: dict[str, OSError] = field(default_factory=dict)  # those whose file could not be removed


class BlobStore:
    """A folder of records: ``ab/cdef…`` for the digest ``abcdef…``. Safe to use from many threads, by one process."""

    def __init__(self, folder: Path) -> None:
        """Opens or creates. What an earlier process left half-written is removed."""
        self._folder = folder
        self._temporary = folder / "tmp"
        # Of the fields below, never held over a look at disk or catalog: an event loop takes it.
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        self._held: Counter[str] = Counter()
        self._held_meanwhile: list[set[str]] = []  # for each sweep that is looking into the catalog
        self._going: Counter[str] = Counter()  # whose files sweeps are removing
        self._num_keeping = 0  # of those who want all records kept
        self._spared: set[str] = set()  # by sweeps meanwhile
        self._num_temporary = 0
        self._temporary.mkdir(parents=True, exist_ok=True)
        for path in self._temporary.iterdir():
            path.unlink()
        for byte in range(256):
            (folder / f"{byte:02x}").mkdir(exist_ok=True)
        fsync_folder(folder)
        fsync_folder(folder.parent)

    @contextlib.contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """Keeps the record from being swept before the catalog names it. Waits for no sweep; ``put`` does."""
        with self._lock:
            self._held[digest] += 1
            for held in self._held_meanwhile:
                held.add(digest)
        try:
            yield
        finally:
            with self._lock:
                self._held[digest] -= 1
                self._held += Counter()  # drops the zeros

    @contextlib.contextmanager
    def keep_all(self) -> Iterator[None]:
        """No sweep removes anything meanwhile. What they spared is for ``take_spared`` to say, and to sweep anew."""
        with self._lock:
            self._num_keeping += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_keeping -= 1

    @property
    def is_keeping(self) -> bool:
        """Somebody wants all records kept."""
        return self._num_keeping > 0

    def take_spared(self) -> set[str]:
        """What sweeps would have removed and did not, since the last call."""
        with self._lock:
            spared, self._spared = self._spared, set()
            return spared

    def put(self, digest: str, record: bytes) -> None:
        """Makes the record durable; free of writes where a sound copy is there. Call it inside ``hold``."""
        path = self.path(digest)
        with self._gone:
            self._gone.wait_for(lambda: digest not in self._going)
        if not self.is_sound(digest):
            with self._lock:
                self._num_temporary += 1
                temporary = self._temporary / str(self._num_temporary)
            try:
                with temporary.open("xb") as file:
                    file.write(record)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        # Also for a copy that was there: whoever renamed it may not have come to this line yet.
        fsync_folder(path.parent)

    def get(self, digest: str) -> bytes:
        """The record, checked against its digest. DataLossError where it is missing or corrupt."""
        try:
            record = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise DataLossError(
                f"gradient {digest} is missing from the blob store; ingest its document again", digest=digest
            ) from None
        except OSError as error:
            if error.errno in _NOT_THE_DISK:
                raise
            raise DataLossError(
                f"gradient {digest} can't be read from the blob store ({error}); ingest its document again",
                digest=digest,
            ) from error
        if record_digest(record) != digest:
            raise DataLossError(
                f"gradient {digest} is corrupt in the blob store; ingest its document again", digest=digest
            )
        return record

    def is_sound(self, digest: str) -> bool:
        """The record is there and matches its digest."""
        try:
            self.get(digest)
        except DataLossError:
            return False
        return True

    def sweep(self, references: References, digests: Iterable[str] | None = None) -> Sweep:
        """Removes those of ``digests`` (all files where None) that are neither held nor referenced."""
        sweep = Sweep()
        rest = iter(digests if digests is not None else self._digests())
        while batch := list(islice(rest, SWEEP_BATCH)):
            with self._claim(batch, references, sweep) as going:
                for digest in going:
                    try:
                        self.path(digest).unlink()
                        sweep.num_removed += 1
                    except FileNotFoundError:
                        pass
                    except OSError as error:
                        sweep.failed[digest] = error
        return sweep

    @contextlib.contextmanager
    def _claim(self, digests: list[str], references: References, sweep: Sweep) -> Iterator[Set[str]]:
        """Those of ``digests`` whose files are to go; who wants to ``put`` one of them waits meanwhile.

        An ingest holds before it writes and lets go after its commit. So what is held neither before the look into
        the catalog nor during it is either in what the catalog said or nobody's.
        """
        held_meanwhile: set[str] = set()
        unwanted: set[str] = set()
        with self._lock:
            idle = [digest for digest in digests if digest not in self._held]
            self._held_meanwhile.append(held_meanwhile)
        try:
            unwanted = set(idle) - references(idle)
        finally:
            with self._lock:
                # By identity: another sweep's may be equal.
                self._held_meanwhile = [held for held in self._held_meanwhile if held is not held_meanwhile]
                unwanted -= held_meanwhile
                going = set() if self._num_keeping else unwanted
                self._spared |= unwanted - going
                self._going.update(going)
        sweep.unwanted |= unwanted
        sweep.spared |= unwanted - going
        try:
            yield going
        finally:
            with self._gone:
                self._going -= Counter(going)
                self._gone.notify_all()

    def _digests(self) -> Iterator[str]:
        for byte in range(256):
            with os.scandir(self._folder / f"{byte:02x}") as entries:
                names = [entry.name for entry in entries]
            yield from (f"{byte:02x}{name}" for name in names if _DIGEST.fullmatch(f"{byte:02x}{name}"))

    def path(self, digest: str) -> Path:
        """Where the record lies or would. ValueError for a name that is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest must be 64 lower-case hex digits, got {digest[:80]!r}")
        return self._folder / digest[:2] / digest[2:]


def fsync_folder(folder: Path) -> None:
    """Makes a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
