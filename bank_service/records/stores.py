"""The stores and the thread pools that the parts of a bank share."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from bank_service.blobs.blob_store import BlobStore
from bank_service.cache.record_cache import RecordCache
from bank_service.catalog.contract import Catalog

NUM_IO_THREADS = 8
NUM_BLOB_THREADS = 16  # more, because they wait for an object store


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
    blob_reads: Executor  # an object store may be slow, and queries don't wait for it
    blob_writes: Executor
    query_embeds: Executor
    document_embeds: Executor
    sentence_embeds: Executor  # of documents that were stored without their sentences' vectors

    @classmethod
    def of(cls, embed_threads: int) -> Self:
        """``embed_threads``: of each pool that computes embeddings."""
        return cls(
            reads=ThreadPoolExecutor(NUM_IO_THREADS, "bank-read"),
            past_queries=ThreadPoolExecutor(1, "bank-past-query"),
            writes=ThreadPoolExecutor(NUM_IO_THREADS, "bank-write"),
            blob_reads=ThreadPoolExecutor(NUM_BLOB_THREADS, "bank-read-blob"),
            blob_writes=ThreadPoolExecutor(NUM_BLOB_THREADS, "bank-write-blob"),
            query_embeds=ThreadPoolExecutor(embed_threads, "bank-embed-query"),
            document_embeds=ThreadPoolExecutor(embed_threads, "bank-embed-document"),
            sentence_embeds=ThreadPoolExecutor(embed_threads, "bank-embed-sentences"),
        )

    def shutdown(self) -> None:
        """Returns when the work under way has ended. The reads are last, because other work needs them."""
        for pool in (
            self.query_embeds, self.document_embeds, self.writes, self.blob_writes, self.past_queries, self.blob_reads,
            self.reads,
        ):  # fmt: skip
            pool.shutdown()
