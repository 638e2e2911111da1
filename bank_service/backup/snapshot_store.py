"""Where snapshots lie: a folder, or an object store that fsspec knows."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from bank_service.blobs.blob_store import fsync_folder
from bank_service.errors import SnapshotError
from bank_service.wire.codec import record_digest

_BLOBS = "blobs"  # the one folder in a snapshot


class SnapshotStore(Protocol):
    """Files by name (``blobs/ab/cdef…``). OSError, or the object store's own errors, where it fails."""

    def sizes(self) -> dict[str, int]:
        """Name → bytes of all files, and what else is there."""

    def read(self, name: str) -> bytes:
        """FileNotFoundError."""

    def get(self, name: str, path: Path) -> None:
        """Copies to ``path``. FileNotFoundError."""

    def put(self, name: str, path: Path) -> None:
        """Copies ``path``, which nobody writes any more."""

    def is_sound(self, name: str, path: Path, digest: str) -> bool:
        """Whether a file that is there, of the right size, needn't be copied again from ``path``."""

    def write(self, name: str, content: bytes) -> None:
        """Writes whole or not at all."""

    def remove(self, name: str) -> None:
        """No error where it isn't there."""

    def flush(self) -> None:
        """Makes durable what was put and written."""


def open_store(target: str) -> SnapshotStore:
    """``target``: a folder, or a URL with a protocol of fsspec's. SnapshotError where it can't be opened."""
    if target.startswith("file://"):
        target = target.removeprefix("file://")
    if "://" not in target:
        if not target.startswith("/"):
            raise SnapshotError(f"a snapshot must lie in an absolute folder or at a URL, got {target[:200]!r}")
        return FolderStore(Path(target))
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise SnapshotError(
            "fsspec must be installed for snapshots at URLs; pip install fsspec and its package for that store"
        ) from error
    try:
        system, root = fsspec.core.url_to_fs(target)
    except (ImportError, ValueError) as error:  # an unknown protocol, or one whose package is missing
        raise SnapshotError(
            f"a snapshot must lie at a URL that fsspec can open, got {target[:200]!r}: {error}"
        ) from None
    return ObjectStore(system, root)


class FolderStore:
    """A folder of this machine. Files of the same file system are linked: blobs and their snapshots never change."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._unflushed: set[Path] = set()

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if self._root.exists():
            for entry in os.scandir(self._root):
                if entry.is_dir() and entry.name != _BLOBS:
                    found[entry.name + "/"] = 0  # somebody's, and not walked through
                elif entry.is_file():
                    found[entry.name] = entry.stat().st_size
            for path in (self._root / _BLOBS).glob("*/*"):
                found[str(path.relative_to(self._root))] = path.stat().st_size
        return found

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(self._root / name, path)

    def put(self, name: str, path: Path) -> None:
        new = self._new(name)
        try:
            os.link(path, new)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, new)
            with new.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(new, self._root / name)

    def is_sound(self, name: str, path: Path, digest: str) -> bool:
        # The bank's own file is the bank's to verify and mend. A mended one is another file, and what was linked
        # before is still the damaged one.
        own = self._root / name
        return (path.exists() and own.samefile(path)) or record_digest(own.read_bytes()) == digest

    def write(self, name: str, content: bytes) -> None:
        new = self._new(name)
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._root / name)

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def flush(self) -> None:
        for folder in self._unflushed:
            fsync_folder(folder)
        self._unflushed.clear()

    def _new(self, name: str) -> Path:
        """The file's place until it is whole; what a killed snapshot left there is gone."""
        path = self._root / name
        if path.parent not in self._unflushed:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)  # texts are for this user alone
            path.parent.mkdir(parents=True, exist_ok=True)
            self._unflushed |= {path.parent, path.parent.parent}
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        return new


class ObjectStore:
    """A store of fsspec's, which makes whole objects at once."""

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        self._system.invalidate_cache()
        found: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError):
            found = self._system.find(self._root, detail=True)
        return {name.removeprefix(self._root).lstrip("/"): int(info["size"]) for name, info in found.items()}

    def read(self, name: str) -> bytes:
        return bytes(self._system.cat_file(f"{self._root}/{name}"))

    def get(self, name: str, path: Path) -> None:
        self._system.get_file(f"{self._root}/{name}", str(path))

    def is_sound(self, name: str, path: Path, digest: str) -> bool:
        return True  # object stores verify what they keep

    def put(self, name: str, path: Path) -> None:
        self._system.put_file(str(path), f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        self._system.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{name}")

    def flush(self) -> None:
        """An object is durable when its store has taken it."""
