"""Objects in a folder of this machine: one file each."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FolderObjects:
    """Implements ``Objects``. One process may write to the folder at a time."""

    def __init__(self, root: Path, unfinished: str) -> None:
        """``unfinished`` names the folder in ``root`` for files that are not whole yet. Nothing is created here."""
        self._root = root
        self._unfinished = root / unfinished
        self._numbers = itertools.count(1)
        self._durable: set[Path] = set()  # folders whose own names are durable

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def put(self, name: str, content: bytes) -> None:
        with self._written(name) as new, new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.sync([name])

    def add(self, name: str, content: bytes) -> bool:
        if (self._root / name).exists():
            return False
        self.put(name, content)
        return True

    def list(self) -> Iterator[str]:
        return self._below("")

    def remove(self, name: str) -> None:
        (self._root / name).unlink()

    def sizes(self) -> Iterator[tuple[str, int]]:
        for name in self._below(""):
            yield name, (self._root / name).stat().st_size

    def size(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def put_file(self, name: str, path: Path) -> None:
        """Links the file where both are on one file system. A link is safe because objects never change."""
        with self._written(name) as new:
            try:
                os.link(path, new)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, new)
                with new.open("rb") as file:
                    os.fsync(file.fileno())

    def get_file(self, name: str, path: Path) -> None:
        shutil.copyfile(self._root / name, path)

    def sync(self, names: Iterable[str]) -> None:
        self._sync_folders({(self._root / name).parent for name in names})

    def path(self, name: str) -> Path | None:
        return self._root / name

    def add_folders(self, names: Iterable[str]) -> None:
        """Makes folders ahead, durably. Without it, the first ``put`` into each folder makes the folder."""
        folders = {self._root / name for name in names}
        for folder in folders:
            self._make(folder)
        self._sync_folders({folder.parent for folder in folders})
        self._durable |= folders

    def remove_unfinished(self) -> None:
        """Removes the half-written files of a killed process. Nobody may write meanwhile."""
        with suppress(FileNotFoundError):
            for path in self._unfinished.iterdir():
                path.unlink()

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        """Gives the path of a file to write. At the end of the block the file becomes the object."""
        path = self._root / name
        new = self._unfinished / str(next(self._numbers))
        if path.parent not in self._durable:
            self._make(path.parent)
        new.unlink(missing_ok=True)  # a killed process may have left it
        try:
            yield new
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)  # only this user may read the texts
        self._unfinished.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)

    def _sync_folders(self, folders: set[Path]) -> None:
        """Makes the folders' entries and the folders' own names durable."""
        wanted, new = set(folders), set()
        for folder in folders:
            while folder != self._root.parent and folder not in self._durable:
                new.add(folder)
                folder = folder.parent
                wanted.add(folder)
        for folder in wanted:
            fsync_folder(folder)
        self._durable |= new

    def _below(self, folder: str) -> Iterator[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                found = [(entry.name, entry.is_dir()) for entry in entries]
        except FileNotFoundError:
            return
        for name, is_folder in found:
            if is_folder:
                yield from self._below(f"{folder}{name}/")
            else:
                yield folder + name


def fsync_folder(folder: Path) -> None:
    """Makes a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replaces a file, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    fsync_folder(path.parent)
