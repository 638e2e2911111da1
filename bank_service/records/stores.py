"""What the parts of a bank share: its stores and its threads."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from bank_service.blobs.blob_store import BlobStore
from bank_service.cache.gradient_cache import GradientCache
from bank_service.catalog.contract import Catalog


@dataclass(frozen=True, slots=True)
class Stores:
    """Where a collection lies."""

    catalog: Catalog
    blobs: BlobStore
    cache: GradientCache


@dataclass(frozen=True, slots=True)
class Pools:
    """Threads by kind of work, so that one kind does not hold up another."""

    reads: Executor
    past_queries: Executor  # each may compare with all past versions of a namespace
    writes: Executor
    query_embeds: Executor
    document_embeds: Executor
