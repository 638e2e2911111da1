"""The stores and the thread pools that the parts of a bank share."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from bank_service.blobs.blob_store import BlobStore
from bank_service.cache.record_cache import RecordCache
from bank_service.catalog.contract import Catalog


@dataclass(frozen=True, slots=True)
class Stores:
    """Everything that a collection is stored in."""

    catalog: Catalog
    blobs: BlobStore
    cache: RecordCache


@dataclass(frozen=True, slots=True)
class Pools:
    """A thread pool for each kind of work, so that one kind does not delay another."""

    reads: Executor
    past_queries: Executor  # a query may compare with all past versions of a namespace
    writes: Executor
    query_embeds: Executor
    document_embeds: Executor
