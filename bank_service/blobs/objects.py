"""The contract of a store of objects. Blobs and snapshots stand on it alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol


class Objects(Protocol):
    """Bytes by name, such as ``ab/cdef…``. Safe to use from many threads.

    An object is there whole or not at all. It never changes in place: a new one replaces it.
    Every method raises OSError, or the store's own errors, where the store fails.
    """

    def read(self, name: str) -> bytes:
        """The bytes of an object. FileNotFoundError."""

    def put(self, name: str, content: bytes) -> None:
        """Stores an object. It is durable on return."""

    def list(self) -> Iterator[str]:
        """The names of all objects, in any order."""

    def remove(self, name: str) -> None:
        """Removes an object. FileNotFoundError, as far as the store can tell."""

    def sizes(self) -> Iterator[tuple[str, int]]:
        """As ``list``, with the bytes of each object. A folder has to look at every file for it."""

    def put_file(self, name: str, path: Path) -> None:
        """Stores the content of a file that nobody writes any more. It is durable after ``sync``."""

    def get_file(self, name: str, path: Path) -> None:
        """Copies an object to ``path``. FileNotFoundError."""

    def sync(self, names: Iterable[str]) -> None:
        """Makes durable what ``put_file``, or a process that was killed, has stored under ``names``."""

    def path(self, name: str) -> Path | None:
        """The file in which the object lies, or would lie. None where the store has no files on this machine."""
