"""The vectors of all namespaces in usearch. Each namespace has a graph, and all graphs have a snapshot on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bank_service.search.usearch.graph import Graph, new_index
from bank_service.values.vectors import KeyArray, unit
from bank_service.wire.record import FloatArray

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_Files = dict[str, tuple[str, str]]  # by namespace: the file's name and checksum


class UsearchIndex:
    """Finds nearest vectors by cosine, per namespace. Safe to call from many threads."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._lock = threading.Lock()  # protects the table below
        self._graphs: dict[str, Graph] = {}
        self._saved: dict[str, tuple[int, str]] = {}  # namespace → (last saved version, checksum of its file)

    def put(self, namespace: str, keys: Sequence[int], vectors: FloatArray) -> None:
        """Adds or replaces ``vectors``, float32 (len(keys), dimension), finite and not zero. Keys must be distinct."""
        with self._lock:
            graph = self._graphs.setdefault(namespace, Graph(new_index(self._dimension)))
        graph.put(np.asarray(keys, dtype=np.uint64), unit(vectors))

    def remove(self, namespace: str, keys: Sequence[int]) -> None:
        """Removes keys. Unknown keys are ignored."""
        graph = self._graph(namespace)
        if graph is not None:
            graph.remove(np.asarray(keys, dtype=np.uint64))

    def search(self, namespace: str, vector: FloatArray, count: int) -> tuple[KeyArray, FloatArray]:
        """The nearest keys, best first, and their cosines. Both have at least min(count, size) entries."""
        graph = self._graph(namespace)
        if graph is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return graph.search(unit(vector), count)

    def num_vectors(self) -> int:
        """The number of vectors of all namespaces."""
        with self._lock:
            return sum(graph.size() for graph in self._graphs.values())

    def size(self, namespace: str) -> int:
        """The number of keys in the namespace; 0 for an unknown namespace."""
        graph = self._graph(namespace)
        return 0 if graph is None else graph.size()

    def wasteful(self, share: float, least: int) -> list[str]:
        """The namespaces with too many nodes of removed vectors: more than ``share`` of all, and at least ``least``.
        Also those whose graphs are of an older version."""
        with self._lock:
            graphs = dict(self._graphs)
        return [
            name
            for name, graph in graphs.items()
            if graph.is_old or graph.num_dead() > max(share * graph.num_nodes(), least - 1)
        ]

    def empty_like(self) -> UsearchIndex:
        """An empty index for the same vectors."""
        return UsearchIndex(self._dimension)

    def take(self, namespace: str, other: UsearchIndex) -> None:
        """Replaces a namespace's graph by the one of ``other``, which must not be used afterwards. Searches under way
        end on the old graph."""
        with other._lock:
            graph = other._graphs.get(namespace)
        with self._lock:
            if graph is None:
                self._graphs.pop(namespace, None)
            else:
                self._graphs[namespace] = graph

    def save(self, folder: Path, collection_id: str, sequence: int) -> None:
        """Writes a snapshot that reflects ``sequence``. No ``put`` or ``remove`` may run meanwhile. OSError.

        It writes only changed namespaces. The files of the others stay, and the new manifest names them.
        """
        shutil.rmtree(folder.with_name(folder.name + ".new"), ignore_errors=True)  # older banks used this folder
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unnamed(folder)  # a crash may have left files
        try:
            files, saved = self._write_changed(folder)
            manifest = {
                "collection_id": collection_id, "sequence": sequence, "dimension": self._dimension, "files": files
            }  # fmt: skip
            temporary = folder / (MANIFEST + ".new")
            temporary.write_text(json.dumps(manifest))
            # No fsync. After a crash, a torn snapshot fails its checksums, and the index is rebuilt.
            os.replace(temporary, folder / MANIFEST)
            self._saved = saved
        finally:
            _remove_unnamed(folder)

    def _write_changed(self, folder: Path) -> tuple[_Files, dict[str, tuple[int, str]]]:
        """Writes the graphs that changed. Returns the files for the manifest, and the new value of ``_saved``."""
        named = _named(folder)
        with self._lock:
            graphs = dict(self._graphs)
        free = 1 + max((int(path.stem) for path in folder.glob("*.usearch") if path.stem.isdecimal()), default=-1)
        files, saved = {}, {}
        for namespace, graph in graphs.items():
            name, checksum = named.get(namespace, ("", ""))
            version = graph.version
            if self._saved.get(namespace) != (version, checksum) or not (folder / name).is_file():
                name, free = f"{free}.usearch", free + 1
                version = graph.save(folder / name)
                checksum = _checksum(folder / name)
            files[namespace] = (name, checksum)
            saved[namespace] = (version, checksum)
        return files, saved

    def load(self, folder: Path, collection_id: str) -> int:
        """Loads the snapshot and returns the sequence that it reflects. If it can't be used, the index is empty and the
        sequence is 0."""
        try:
            sequence, graphs, files = _read_snapshot(folder, collection_id, self._dimension)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("the index snapshot in %s is unusable (%s); rebuilding it from the catalog", folder, error)
            return 0
        self._graphs = graphs
        self._saved = {namespace: (graph.version, files[namespace][1]) for namespace, graph in graphs.items()}
        return sequence

    def clear(self) -> None:
        """Removes all vectors from memory."""
        with self._lock:
            self._graphs = {}

    def _graph(self, namespace: str) -> Graph | None:
        with self._lock:
            return self._graphs.get(namespace)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(folder: Path) -> _Files:
    """The files that the folder's manifest names. Empty if there is no readable manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {namespace: (str(name), str(checksum)) for namespace, (name, checksum) in files.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remove_unnamed(folder: Path) -> None:
    """Removes the files that the manifest does not name, from older or unfinished snapshots."""
    names = {name for name, _ in _named(folder).values()} | {MANIFEST}
    for path in folder.iterdir():
        if path.name not in names and path.is_file():
            path.unlink()


def _read_snapshot(folder: Path, collection_id: str, dimension: int) -> tuple[int, dict[str, Graph], _Files]:
    manifest = json.loads((folder / MANIFEST).read_text())
    if (manifest["collection_id"], manifest["dimension"]) != (collection_id, dimension):
        raise ValueError("it belongs to another collection")
    graphs = {}
    for namespace, (name, checksum) in manifest["files"].items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
        graphs[namespace] = Graph.load(folder / name, dimension)
    return int(manifest["sequence"]), graphs, manifest["files"]
