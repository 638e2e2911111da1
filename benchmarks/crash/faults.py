"""Patches for the bank process of a crash test. It dies at a chosen place, or it has a planted bug."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import bank_service.blobs.folder_objects
import bank_service.catalog.sql.catalog_writes
import bank_service.search.usearch.usearch_index
from bank_service.backup.snapshot import Manifest, SnapshotWriter
from bank_service.blobs.blob_store import BlobStore
from bank_service.blobs.remote_objects import RemoteObjects
from bank_service.blobs.shared_holds import SharedHolds
from bank_service.cache.redis_cache import RedisCache
from bank_service.catalog.postgres.postgres_nodes import PostgresNodes
from bank_service.catalog.sql.group_commit import GroupCommit
from bank_service.catalog.sql.sql_catalog import SqlCatalog
from bank_service.records.discarder import Discarder
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.search.usearch.usearch_index import UsearchIndex
from bank_service.testing.hash_encoder import HashEncoder
from bank_service.values.encoder import EncodedDocument

# Name of a point → the function that is called there.
POINTS: dict[str, tuple[Any, str]] = {
    "in the write of a blob": (bank_service.blobs.folder_objects, "os.fsync"),
    "before a blob gets its name": (bank_service.blobs.folder_objects, "os.replace"),
    "between blob and catalog": (SqlCatalog, "put"),
    "in a transaction of the catalog": (bank_service.catalog.sql.catalog_writes, "_next_sequence"),
    "between commit and acknowledgement": (AcknowledgedSequence, "advance"),
    "in a deletion": (SqlCatalog, "delete"),
    "at the start of an index snapshot": (UsearchIndex, "save"),
    "between the old and the new index snapshot": (bank_service.search.usearch.usearch_index, "os.replace"),
    "in a sweep, before anything is removed": (Discarder, "references"),
    "after a sweep, before the cache": (RedisCache, "remove"),
    "in a bank snapshot": (SnapshotWriter, "copy"),
    "before a bank snapshot's manifest": (Manifest, "write"),
}
# Those of a node that has its catalog and its object store together with others.
NODE_POINTS: dict[str, tuple[Any, str]] = {
    **{name: POINTS[name] for name in (
        "between blob and catalog", "in a transaction of the catalog", "between commit and acknowledgement",
        "in a deletion",
    )},
    "before a hold that others see": (SharedHolds, "wait_removed"),
    "between a hold and the write of its object": (RemoteObjects, "add"),
}  # fmt: skip
# Only the node that does the upkeep comes to these.
UPKEEP_POINTS: dict[str, tuple[Any, str]] = {
    "before a removal is decided": (PostgresNodes, "begin_removal"),
    "between the decision and the removal": (RemoteObjects, "remove"),
    "after a removal, before others know": (PostgresNodes, "end_removal"),
    "after a removal, before the cache": (RedisCache, "remove"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """The process kills itself when it reaches ``point`` for the ``passes``-th time."""

    point: str
    passes: int = 1

    def arm(self) -> None:
        owner, name = (POINTS | NODE_POINTS | UPKEEP_POINTS)[self.point]
        if name.startswith("os."):
            name = name.removeprefix("os.")
            owner.os = owner = _Proxy(owner.os)
        setattr(owner, name, self._dying(getattr(owner, name)))

    def _dying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        left = self.passes
        lock = threading.Lock()

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped


class _Proxy:
    """A module as one other module sees it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def plant(bug: str, encoder: HashEncoder) -> None:
    """Puts one of ``BUGS`` into this process."""
    BUGS[bug](encoder)


def _acknowledge_early(_: HashEncoder) -> None:
    def commit(self: GroupCommit, batch: list[tuple[Callable[[Any], Any], Any]]) -> None:
        with self._engine.begin() as connection:
            for operation, future in batch:
                try:
                    with connection.begin_nested():
                        result = operation(connection)
                except Exception as error:  # noqa: BLE001 - as the commit itself does
                    future.set_exception(error)
                else:
                    future.set_result(result)
            time.sleep(0.1)

    GroupCommit._commit = commit  # type: ignore[method-assign]


def _commit_before_the_blob(_: HashEncoder) -> None:
    put = BlobStore.put

    def put_later(self: BlobStore, digest: str, record: bytes) -> None:
        threading.Timer(0.1, put, (self, digest, record)).start()

    BlobStore.put = put_later  # type: ignore[method-assign]


def _give_the_neighbours_gradient(encoder: HashEncoder) -> None:
    honest = encoder.encode

    def encode(documents: list[tuple[str, str]]) -> list[EncodedDocument]:
        return honest(documents)[::-1]

    encoder.encode = encode  # type: ignore[method-assign, assignment]


BUGS: dict[str, Callable[[HashEncoder], None]] = {
    "acknowledged before the commit": _acknowledge_early,
    "committed before the blob is durable": _commit_before_the_blob,
    "a neighbour's gradient": _give_the_neighbours_gradient,
}
