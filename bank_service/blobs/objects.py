"""The contract of a store of objects. Blobs and snapshots both use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol


class ObjectsUnavailableError(OSError):
    """The store does not answer, or refuses this bank. It tells nothing about an object."""

    status: str | None = None  # of the store's answer, such as "403 Forbidden (AccessDenied)"; None: no answer


class ObjectsTakenError(OSError):
    """Another process has opened the store, so this one may remove nothing from it."""


class ObjectBusyError(OSError):
    """Another process may be writing or removing the object now."""


class Objects(Protocol):
    """Bytes by name, such as ``ab/cdef…``. Safe to use from many threads.

    An object is there whole or not at all. It never changes in place: a new one replaces it.
    Every method raises OSError where the store fails. ObjectsUnavailableError is one of them.
    """

    def read(self, name: str) -> bytes:
        """The bytes of an object. FileNotFoundError."""

    def put(self, name: str, content: bytes) -> None:
        """Stores an object. It is durable on return."""

    def add(self, name: str, content: bytes) -> bool:
        """Does the same as ``put`` unless there is an object of that name. False if there is one. Callers of one name
        at once must bring the same content."""

    def list(self) -> Iterator[str]:
        """The names of all objects, in any order."""

    def remove(self, name: str) -> None:
        """Removes an object. FileNotFoundError, as far as the store can tell."""

    def sizes(self) -> Iterator[tuple[str, int]]:
        """The name and the bytes of each object, in any order. Slower than ``list`` in a folder, which looks at every
        file."""

    def size(self, name: str) -> int:
        """The bytes of one object. FileNotFoundError."""

    def put_file(self, name: str, path: Path) -> None:
        """Stores the content of a finished file. It is durable after ``sync``."""

    def get_file(self, name: str, path: Path) -> None:
        """Copies an object to ``path``. FileNotFoundError."""

    def sync(self, names: Iterable[str]) -> None:
        """Makes the objects of these names durable. ``put_file`` or a killed process may have stored them."""

    def path(self, name: str) -> Path | None:
        """The path of the object's file, whether it exists or not. None for a store without files on this machine."""
