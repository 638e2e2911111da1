"""The records' files in an arena, as workers read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ArenaError(RuntimeError):
    """The arena can't do an operation. The message gives the reason."""


class ArenaCorrupt(ArenaError):
    """The digest of a record's bytes isn't the expected one."""


class ArenaMissing(ArenaError):
    """The arena has no such record."""


def read_record(folder: str | Path, digest: str) -> bytes:
    """One record of an arena, checked against its digest. ArenaCorrupt, ArenaMissing, ArenaError."""
    with _reading(folder, digest):
        record = (Path(folder) / file_name(digest)).read_bytes()
    check_record(record, folder, digest)
    return record


def record_file(folder: str | Path, digest: str) -> tuple[Path, int]:
    """The file of a record, whose bytes go to ``check_record``, and its size in bytes. ArenaMissing, ArenaError."""
    path = Path(folder) / file_name(digest)
    with _reading(folder, digest):
        return path, path.stat().st_size


def check_record(record: bytes | memoryview, folder: str | Path, digest: str) -> None:
    """ArenaCorrupt if these bytes haven't the digest."""
    if hashlib.sha256(record).hexdigest() != digest:
        raise ArenaCorrupt(f"gradient {digest} in arena {folder} must have that SHA-256; its file was damaged")


@contextmanager
def _reading(folder: str | Path, digest: str) -> Iterator[None]:
    """The system's errors as the arena's."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArenaMissing(
            f"arena {folder} must hold gradient {digest}, it does not; was its folder removed?"
        ) from error
    except OSError as error:
        raise ArenaError(f"gradient {digest} in arena {folder} can't be read: {error}") from error


def file_name(digest: str) -> str:
    """The name of a record's file. ValueError for anything but 64 hex digits, so that no path leaves the folder."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"a gradient's digest must be 64 hex digits, got {digest!r}")
    return digest
