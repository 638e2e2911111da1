"""The arena: gradient records in shared memory, one file per record, named by its digest.

The API process fills it, and the engine's workers read its files. A request holds the records that it uses, and a held
record is never evicted. Of the other records the least recently used one is evicted first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from regrad_vllm.serve.arena.folders import default_root, make_folder
from regrad_vllm.serve.arena.record_files import ArenaCorrupt, ArenaError, file_name


class ArenaFull(ArenaError):
    """There is no room, because all records in the arena are in use."""


@dataclass(frozen=True, slots=True)
class ArenaFigures:
    """The arena's content and counts since its start. The status endpoint shows them by these names."""

    max_bytes: int
    used_bytes: int
    num_records: int
    num_held: int  # records that are held
    num_holds: int  # of requests
    num_hits: int
    num_misses: int
    num_evictions: int


@dataclass(frozen=True, slots=True)
class ArenaRecord:
    """A record in the arena. GET /v1/regrad/resident shows it by these names."""

    gradient_digest: str
    num_bytes: int
    num_uses: int  # requests that took it since it came
    num_holds: int  # requests that hold it now


@dataclass(slots=True)
class _Stored:
    num_bytes: int
    num_uses: int = 0
    num_holds: int = 0
    doomed: bool = False  # it is not given out again, and it is removed with its last hold


class Arena:
    """All gradient records of one server. Thread-safe; every method is synchronous and short."""

    def __init__(self, folder: Path, max_bytes: int, lock_file: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock_file = lock_file  # stays open, because its flock shows that the owner is alive
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Stored] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._num_holds = 0
        self._num_hits = 0
        self._num_misses = 0
        self._num_evictions = 0

    @classmethod
    def open(cls, root: str | Path | None, max_bytes: int) -> Arena:
        """A new, empty arena under ``root``. It first removes the folders of dead owners.

        ArenaError if the folder can't be made.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        root = Path(root) if root is not None else default_root()
        try:
            folder, lock_file = make_folder(root)
        except OSError as error:
            raise ArenaError(f"arena folder under {root} can't be made: {error}; set --regrad-arena-dir") from error
        return cls(folder, max_bytes, lock_file)

    @property
    def folder(self) -> Path:
        return self._folder

    def hold(self) -> ArenaHold:
        """A new, empty hold for one request. Release it when the engine is done with the request."""
        with self._lock:
            self._num_holds += 1
        return ArenaHold(self)

    def figures(self) -> ArenaFigures:
        with self._lock:
            return ArenaFigures(
                max_bytes=self._max_bytes,
                used_bytes=self._used_bytes,
                num_records=len(self._entries),
                num_held=sum(entry.num_holds > 0 for entry in self._entries.values()),
                num_holds=self._num_holds,
                num_hits=self._num_hits,
                num_misses=self._num_misses,
                num_evictions=self._num_evictions,
            )

    def records(self, limit: int) -> list[ArenaRecord]:
        """Up to ``limit`` records that a request would find, the most recently used first."""
        with self._lock:
            present = ((digest, entry) for digest, entry in reversed(self._entries.items()) if not entry.doomed)
            return [
                ArenaRecord(digest, entry.num_bytes, entry.num_uses, entry.num_holds)
                for digest, entry in islice(present, limit)
            ]

    def close(self) -> None:
        """Removes the folder and releases its lock. Idempotent."""
        with self._lock:
            if self._lock_file < 0:
                return
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock_file)
            self._lock_file = -1
            self._entries.clear()
            self._used_bytes = 0

    # The methods of ``ArenaHold``, under the lock.

    def _hold_present(self, hold: ArenaHold, digests: Iterable[str]) -> list[str]:
        """Holds the present ones of the distinct ``digests``. Returns the missing ones in their order."""
        missing: list[str] = []
        with self._lock:
            self._check_open()
            hold._check_unreleased()
            for digest in dict.fromkeys(digests):
                entry = self._entries.get(digest)
                if entry is None or entry.doomed:
                    self._num_misses += 1
                    missing.append(digest)
                    continue
                self._num_hits += 1
                self._hold(hold, digest, entry)
        return missing

    def _put_held(self, hold: ArenaHold, digest: str, record: bytes) -> None:
        """Publishes a record and holds it. ArenaCorrupt, ArenaFull."""
        path = self._folder / file_name(digest)
        if hashlib.sha256(record).hexdigest() != digest:
            raise ArenaCorrupt(f"a gradient's bytes must have the SHA-256 {digest} that it was fetched by; they do not")
        with self._lock:
            self._check_open()
            hold._check_unreleased()
            entry = self._entries.get(digest)
            if entry is not None and not entry.doomed:  # another request has published it
                self._hold(hold, digest, entry)
                return
            if entry is None:
                self._make_room(len(record))
            self._publish(path, record)
            if entry is None:
                entry = self._entries[digest] = _Stored(len(record))
                self._used_bytes += len(record)
            entry.doomed = False
            self._hold(hold, digest, entry)

    def _hold(self, hold: ArenaHold, digest: str, entry: _Stored) -> None:
        entry.num_uses += 1
        entry.num_holds += 1
        self._entries.move_to_end(digest)
        hold._digests.append(digest)

    def _release(self, hold: ArenaHold, doom: bool) -> None:
        with self._lock:
            if hold._released:
                return
            hold._released = True
            self._num_holds -= 1
            digests, hold._digests = hold._digests, []
            if self._lock_file < 0:
                return
            for digest in digests:
                entry = self._entries[digest]
                entry.num_holds -= 1
                entry.doomed = entry.doomed or doom
                if entry.doomed and not entry.num_holds:
                    self._remove(digest)

    def _check_open(self) -> None:
        if self._lock_file < 0:
            raise ArenaError("the arena must be open; it was closed")

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ArenaFull(
                f"a gradient must fit the arena of {self._max_bytes} bytes, got {num_bytes}; raise --regrad-arena-bytes"
            )
        while self._used_bytes + num_bytes > self._max_bytes:
            if not self._evict():
                raise ArenaFull(
                    f"the arena must have {num_bytes} bytes free, all of its {self._max_bytes} are used by running "
                    "requests; retry later or raise --regrad-arena-bytes"
                )

    def _evict(self) -> bool:
        """Removes the least recently used record that no request holds. False if there is none."""
        for digest, entry in self._entries.items():
            if not entry.num_holds:
                self._remove(digest)
                self._num_evictions += 1
                return True
        return False

    def _publish(self, path: Path, record: bytes) -> None:
        """Writes a record's file. ArenaFull on a full file system; containers often have 64 MiB of shared memory."""
        while True:
            try:
                self._write(path, record)
                return
            except ArenaFull:
                if not self._evict():
                    raise

    def _write(self, path: Path, record: bytes) -> None:
        temporary = path.with_suffix(".new")
        try:
            with open(temporary, "wb") as file:
                file.write(record)
            temporary.chmod(0o400)
            temporary.rename(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ArenaFull(
                    f"the file system of {self._folder} is full before the arena's {self._max_bytes} bytes are; "
                    "lower --regrad-arena-bytes or set --regrad-arena-dir to a larger one"
                ) from error
            raise ArenaError(f"gradient can't be written to {self._folder}: {error}") from error

    def _remove(self, digest: str) -> None:
        entry = self._entries.pop(digest)
        self._used_bytes -= entry.num_bytes
        with suppress(FileNotFoundError):
            (self._folder / file_name(digest)).unlink()


class ArenaHold:
    """Keeps the records of one request in the arena. Release it once, or use it as a context manager.

    A thread may still be inside ``put`` when its request is cancelled and the hold is released. So the arena's lock
    guards both, and a released hold takes no more records.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._digests: list[str] = []  # the arena's lock guards this and _released
        self._released = False

    def take(self, digests: Sequence[str]) -> list[str]:
        """Holds the records that are in the arena. Returns the digests of the missing ones, without repetition."""
        return self._arena._hold_present(self, digests)

    def put(self, digest: str, record: bytes) -> None:
        """Publishes a record and holds it. ArenaCorrupt, ArenaFull."""
        self._arena._put_held(self, digest, record)

    def release(self, *, discard: bool = False) -> None:
        """Releases all records. A second call does nothing. ``discard``: they are unusable and leave the arena."""
        self._arena._release(self, discard)

    def _check_unreleased(self) -> None:
        if self._released:
            raise ArenaError("a hold must take records before it is released; it was released")

    def __enter__(self) -> ArenaHold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
