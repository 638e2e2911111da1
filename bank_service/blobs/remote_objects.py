"""Objects in a store that fsspec knows, such as S3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class RemoteObjects:
    """Implements ``Objects``. A remote store writes an object whole, keeps it durable and verifies it."""

    def __init__(self, system: Any, root: str) -> None:
        """``system`` is a file system of fsspec. ``root`` is the prefix of all names in it."""
        self._system = system
        self._root = root.rstrip("/")

    @classmethod
    def at(cls, url: str) -> RemoteObjects:
        """Opens the store at a URL. ImportError where fsspec or its package for the protocol is missing. ValueError for
        an unknown protocol."""
        import fsspec  # type: ignore[import-untyped]

        return cls(*fsspec.core.url_to_fs(url))

    def read(self, name: str) -> bytes:
        return bytes(self._system.cat_file(self._full(name)))

    def put(self, name: str, content: bytes) -> None:
        self._system.pipe_file(self._full(name), content)

    def list(self) -> Iterator[str]:
        for name, _ in self.sizes():
            yield name

    def remove(self, name: str) -> None:
        self._system.rm_file(self._full(name))

    def sizes(self) -> Iterator[tuple[str, int]]:
        self._system.invalidate_cache()
        try:
            found = self._system.find(self._root, detail=True)
        except FileNotFoundError:
            return
        for name, info in found.items():
            yield name.removeprefix(self._root).lstrip("/"), int(info["size"])

    def put_file(self, name: str, path: Path) -> None:
        self._system.put_file(str(path), self._full(name))

    def get_file(self, name: str, path: Path) -> None:
        self._system.get_file(self._full(name), str(path))

    def sync(self, names: Iterable[str]) -> None:
        """Does nothing: an object is durable once its store has accepted it."""

    def path(self, name: str) -> Path | None:
        return None

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}"
