"""A usearch (HNSW, float16) index per namespace, with a snapshot on disk.

Approximate search can return less than it was asked for, or miss a near neighbour in a graph that is small or
was thinned out by deletions. So small namespaces are searched exhaustively, and so is any search that came back
short. The bank ranks what is found once more, by the catalog's float32 vectors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import bank_service.runtime.onnx_runtime  # noqa: F401 - before usearch

from usearch.index import Index  # isort: skip

from bank_service.values.vectors import KeyArray, unit
from bank_service.wire.codec import FloatArray

logger = logging.getLogger(__name__)

LARGE_SIZE, HUGE_SIZE = 50_000, 300_000  # vectors of a namespace above which a search looks at more
EXHAUSTIVE_SIZE = 5_000  # vectors; as fast as the graph up to there
VECTORS_PER_HOLD = 16  # of a ``put``; searches wait so long, a millisecond each in a graph of a million
MANIFEST = "manifest.json"
_VERSIONS = itertools.count()  # of namespaces' graphs; none is given twice
FILLER_KEY = 2**63 - 1  # no row of a catalog comes to it


_Files = dict[str, tuple[str, str]]  # by namespace: the file's name and checksum


class UsearchIndex:
    """Nearest vectors by cosine, per namespace."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._lock = threading.Lock()  # of the table below
        self._spaces: dict[str, _Space] = {}
        self._saved: dict[str, tuple[int, str]] = {}  # by namespace: the version last saved, its file's checksum

    def put(self, namespace: str, keys: Sequence[int], vectors: FloatArray) -> None:
        with self._lock:
            space = self._spaces.setdefault(namespace, _Space(_new_index(self._dimension)))
        space.put(np.asarray(keys, dtype=np.uint64), unit(vectors))

    def remove(self, namespace: str, keys: Sequence[int]) -> None:
        space = self._space(namespace)
        if space is not None:
            space.remove(np.asarray(keys, dtype=np.uint64))

    def search(self, namespace: str, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        space = self._space(namespace)
        if space is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return space.search(unit(vector), count)

    def num_vectors(self) -> int:
        """Of all namespaces."""
        with self._lock:
            return sum(space.size() for space in self._spaces.values())

    def size(self, namespace: str) -> int:
        space = self._space(namespace)
        return 0 if space is None else space.size()

    def wasteful(self, share: float, least: int) -> list[str]:
        """Namespaces of whose places more than ``share``, and at least ``least``, are of removed vectors."""
        with self._lock:
            spaces = dict(self._spaces)
        return [name for name, space in spaces.items() if space.num_dead() > max(share * space.num_places(), least - 1)]

    def num_dead(self, namespace: str) -> int:
        """Places of removed vectors, which are kept, and the vectors in them until they are overwritten."""
        space = self._space(namespace)
        return 0 if space is None else space.num_dead()

    def overwrite_removed(self, namespace: str, count: int) -> None:
        """Overwrites ``count`` removed vectors, those that were removed first; each takes as long as a new one does.
        After as many as are dead, nothing is left of what was removed before."""
        space = self._space(namespace)
        if space is not None:
            space.overwrite_removed(count)

    def empty_like(self) -> UsearchIndex:
        """An empty index for the same vectors."""
        return UsearchIndex(self._dimension)

    def take(self, namespace: str, other: UsearchIndex) -> None:
        """Replaces a namespace by ``other``'s, which is not to be used after. Searches under way end on the old one."""
        with other._lock:
            space = other._spaces.get(namespace)
        with self._lock:
            if space is None:
                self._spaces.pop(namespace, None)
            else:
                self._spaces[namespace] = space

    def save(self, folder: Path, collection_id: str, sequence: int) -> None:
        """Replaces the snapshot by one that reflects ``sequence``. No ``put`` or ``remove`` meanwhile. OSError.

        Only namespaces that have changed are written: the files of the others stay, and the new manifest names them.
        """
        shutil.rmtree(folder.with_name(folder.name + ".new"), ignore_errors=True)  # of banks before this layout
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unnamed(folder)  # what a crash has left
        try:
            files, saved = self._write_changed(folder)
            manifest = {
                "collection_id": collection_id, "sequence": sequence, "dimension": self._dimension, "files": files
            }  # fmt: skip
            temporary = folder / (MANIFEST + ".new")
            temporary.write_text(json.dumps(manifest))
            # No fsync: a snapshot that a crash has torn fails its checksums and is rebuilt.
            os.replace(temporary, folder / MANIFEST)
            self._saved = saved
        finally:
            _remove_unnamed(folder)

    def _write_changed(self, folder: Path) -> tuple[_Files, dict[str, tuple[int, str]]]:
        """What the manifest is to name, and which state of each namespace that is."""
        named = _named(folder)
        with self._lock:
            spaces = dict(self._spaces)
        free = 1 + max((int(path.stem) for path in folder.glob("*.usearch") if path.stem.isdecimal()), default=-1)
        files, saved = {}, {}
        for namespace, space in spaces.items():
            name, checksum = named.get(namespace, ("", ""))
            version = space.version
            if self._saved.get(namespace) != (version, checksum) or not (folder / name).is_file():
                name, free = f"{free}.usearch", free + 1
                version = space.save(folder / name)
                checksum = _checksum(folder / name)
            files[namespace] = (name, checksum)
            saved[namespace] = (version, checksum)
        return files, saved

    def load(self, folder: Path, collection_id: str) -> int:
        """The sequence that the snapshot reflects, now loaded; 0, and an empty index, where it is of no use."""
        try:
            sequence, spaces, files = _read_snapshot(folder, collection_id, self._dimension)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("the index snapshot in %s is unusable (%s); rebuilding it from the catalog", folder, error)
            return 0
        self._spaces = spaces
        self._saved = {namespace: (space.version, files[namespace][1]) for namespace, space in spaces.items()}
        return sequence

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._spaces = {}

    def _space(self, namespace: str) -> _Space | None:
        with self._lock:
            return self._spaces.get(namespace)


class _Space:
    """One namespace. usearch bears neither a search during a removal nor two that it counts as one thread's."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._size = len(index)
        self._places = int(index.stats.nodes)  # counted from here on: usearch walks through all of them to tell
        self.version = next(_VERSIONS)  # another after each change
        self._lock = threading.Lock()
        self._next = threading.Lock()  # of who has the lock next

    def put(self, keys: KeyArray | np.ndarray, vectors: FloatArray) -> None:
        for start in range(0, len(keys), VECTORS_PER_HOLD):
            part = slice(start, start + VECTORS_PER_HOLD)
            with self._turn():
                self.version = next(_VERSIONS)
                self._remove(keys[part])
                self._index.add(keys[part], vectors[part], threads=1)
                self._size = len(self._index)
                self._places = max(self._places, self._size)  # new vectors fill the places of removed ones first

    def remove(self, keys: np.ndarray) -> None:
        with self._turn():
            self._remove(keys)
            self._size = len(self._index)

    def search(self, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        with self._turn():
            size = self._size
            wanted = min(count, size)
            if not wanted:
                return np.empty(0, np.int64), np.empty(0, np.float32)
            self._index.expansion_search = expansion_of(size)  # type: ignore[misc]  # its annotations hide the setter
            found = self._index.search(vector, wanted, threads=1, exact=size <= EXHAUSTIVE_SIZE)
            if len(found) < wanted:
                found = self._index.search(vector, wanted, threads=1, exact=True)
            return found.keys.astype(np.int64), (1.0 - found.distances).astype(np.float32)

    def size(self) -> int:
        """Does not wait for the lock: a ``put`` under way may show in part."""
        return self._size

    def num_places(self) -> int:
        """Of vectors that are there and of removed ones, whose places the graph keeps until new ones fill them."""
        return self._places

    def num_dead(self) -> int:
        """Places of removed vectors. Does not wait for the lock either."""
        return max(0, self._places - self._size)

    def overwrite_removed(self, count: int) -> None:
        """usearch gives a new vector the place of the one that was removed first, and puts the place of one that is
        removed behind all others. So fillers, each removed at once, come to one place after the other."""
        generator = np.random.default_rng()
        key = np.asarray([FILLER_KEY], dtype=np.uint64)
        for _ in range(count):
            filler = unit(generator.standard_normal((1, self._index.ndim)).astype(np.float32))
            with self._turn():
                # Else it would make a place of its own. What changes meanwhile takes and leaves places likewise.
                if self._places > len(self._index):
                    self.version = next(_VERSIONS)
                    self._index.add(key, filler, threads=1)
                    self._index.remove(key)

    def save(self, path: Path) -> int:
        """The version that it saved. OSError."""
        with self._turn():
            try:
                self._index.save(str(path))
            except RuntimeError as error:  # usearch's word for a disk that is full
                raise OSError(f"{path} could not be written: {error}") from error
            # Of what it still had in a buffer then, it says nothing.
            if path.stat().st_size != self._index.serialized_length:
                raise OSError(f"{path} could not be written: its end is missing")
            return self.version

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, for who waited: a lock alone would go back to a ``put`` that asks again at once."""
        with self._next:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _remove(self, keys: np.ndarray) -> None:
        present = keys[np.atleast_1d(self._index.contains(keys))]
        if len(present):
            self.version = next(_VERSIONS)
            self._index.remove(present)


def expansion_of(size: int) -> int:
    """Candidates that a search keeps among ``size`` vectors. Of a million, 128 found 95.5% of the ten nearest, 256
    found 97.5%, 384 99.3% over the wire (benchmarks/README.md)."""
    return 128 if size <= LARGE_SIZE else 256 if size <= HUGE_SIZE else 384


def _new_index(dimension: int) -> Index:
    return Index(ndim=dimension, metric="cos", dtype="f16", connectivity=16)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(folder: Path) -> _Files:
    """What the folder's manifest names; nothing where there is none, or none that can be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {namespace: (str(name), str(checksum)) for namespace, (name, checksum) in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remove_unnamed(folder: Path) -> None:
    """Files that the manifest does not name: of the snapshot before, or of one that was not finished."""
    names = {name for name, _ in _named(folder).values()} | {MANIFEST}
    for path in folder.iterdir():
        if path.name not in names and path.is_file():
            path.unlink()


def _read_snapshot(folder: Path, collection_id: str, dimension: int) -> tuple[int, dict[str, _Space], _Files]:
    manifest = json.loads((folder / MANIFEST).read_text())
    if (manifest["collection_id"], manifest["dimension"]) != (collection_id, dimension):
        raise ValueError("it belongs to another collection")
    spaces = {}
    for namespace, (name, checksum) in manifest["files"].items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
        index = _new_index(dimension)
        index.load(str(folder / name))
        spaces[namespace] = _Space(index)
    return int(manifest["sequence"]), spaces, manifest["files"]
