"""The bank takes documents in and gives gradients out. It keeps catalog, blobs, index and cache consistent.

Write order: blob (durable) → catalog commit → acknowledgement → index. A lost index is built again from the catalog.
Only reads fill the cache, so an ingest of many documents does not displace the records that queries use. A query waits
until the index reflects every change that was acknowledged before the query began.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from bank_service.backup.snapshot import Progress
from bank_service.backup.snapshotter import Snapshotter
from bank_service.bank_stats import BankStats, publish, read_stats
from bank_service.blobs.place import objects_of, open_blobs
from bank_service.cache.redis_cache import RedisCache
from bank_service.catalog.entries import CollectionIdentity, DeleteResult, ListEntry
from bank_service.catalog.factory import open_catalog, stored_collection
from bank_service.catalog.failures import document_not_found
from bank_service.catalog.nodes import is_current
from bank_service.errors import NotFoundError, ReplicaReadError, UnavailableError
from bank_service.records.committer import Committer
from bank_service.records.discarder import Discarder
from bank_service.records.encode_queue import EncodeQueue
from bank_service.records.record_reader import MayRead, RecordReader
from bank_service.records.stores import Pools, Stores
from bank_service.records.writer import Writer
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.runtime.background import Background
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.threads import in_thread
from bank_service.search.answer_batch import answer_batch
from bank_service.search.cue_finder import CueFinder
from bank_service.search.queries import Queries
from bank_service.search.vector_store import vector_store
from bank_service.upkeep.learner_upgrade import LearnerUpgrade
from bank_service.upkeep.recode import RecodeProgress, Recoder, codec_to_write
from bank_service.upkeep.repair import Repairer
from bank_service.upkeep.scrub import Scrubber, ScrubCounts
from bank_service.upkeep.upkeep import Upkeep
from bank_service.values.config import BankConfig
from bank_service.values.documents import (
    Document,
    PutResult,
    Query,
    QueryResult,
    StoredDocument,
    check_digests,
    check_id,
    check_namespace,
    check_vector,
)
from bank_service.values.embedder import Embedder, embedded_query
from bank_service.values.encoder import Encoder
from bank_service.values.filters import Condition, check_filter
from bank_service.values.namespace_limits import LimitsOf, unlimited
from bank_service.wire.record import DEFAULT_CODEC, FloatArray, max_record_bytes
from bank_service.wire.tracing import span

FETCH_GROUP = 4  # records of one fetch in memory at once
MAX_SEARCHES = 5  # of one query whose hits change while their gradients of another learner are made
PAST_SHARE = 0.25  # of ``max_queries``: at most so many queries may wait for the past at once


class Bank:
    """One collection of documents and gradients. Made by ``open``, ended by ``close``."""

    def __init__(
        self,
        config: BankConfig,
        encoder: Encoder,
        embedder: Embedder,
        cache_url: str,
        metrics: BankMetrics,
        limits_of: LimitsOf = unlimited,
    ) -> None:
        """Builds the parts that need no event loop. CollectionMismatchError where the folder holds another
        collection."""
        spec = encoder.spec
        stored = stored_collection(config.data_dir, config.catalog)
        named = config.codec or (DEFAULT_CODEC if stored is None else stored.codec)
        codec = codec_to_write(named)
        self._identity = CollectionIdentity(spec.fingerprint, spec.layout_id, named, embedder.name, embedder.dimension)
        self._embedder = embedder
        self._data_dir = config.data_dir
        self._pools = Pools.of(config.embed_threads)
        reads, blob_reads = self._pools.reads, self._pools.blob_reads
        catalog = open_catalog(
            config.data_dir, self._identity, limits_of, history_seconds=config.history_seconds, url=config.catalog,
            is_shared=objects_of(config.data_dir, config.objects) is not None, replica=config.replica,
        )  # fmt: skip
        self._cache = cache = RedisCache(cache_url, config.cache_timeout_ms, config.cache_ttl_seconds, reads)
        try:
            self._stores = Stores(catalog, open_blobs(config, catalog), cache)
        except BaseException:
            catalog.close()
            raise
        self._discarder = Discarder(self._stores, self._pools.blob_writes, metrics, config.objects_grace_seconds)
        self._background = Background()
        self._acknowledged = AcknowledgedSequence()
        self._nearest = vector_store(catalog, config, embedder.dimension, self._acknowledged, reads)
        max_past = max(1, int(PAST_SHARE * config.max_queries))
        self._queries = Queries(catalog, self._nearest, self._acknowledged, reads, self._pools.past_queries, max_past)
        self._cues = CueFinder(catalog, embedder, self._pools, self._background)
        queue_of = partial(
            EncodeQueue, batch_size=config.encode_batch_size, wait_ms=config.encode_wait_ms, metrics=metrics
        )
        self._encodes = queue_of(encoder, codec)
        committer = Committer(
            self._stores, self._discarder, self._pools, self._background, spec, codec,
            lambda: self._nearest.keep_up(self._acknowledged.value), self._acknowledged,
        )  # fmt: skip
        self._writer = Writer(
            self._stores, committer, self._pools, self._encodes, embedder, spec, config.max_pending_documents,
            sentences=config.embed_sentences,
        )  # fmt: skip
        self.upgrade = LearnerUpgrade(
            config, self._stores, self._writer, self._discarder, self._background, self._pools, encoder,
            lambda encoder: queue_of(encoder, self._writer.codec),
        )  # fmt: skip
        repairer = Repairer(
            self._stores, self._writer, self._discarder, self._encodes, self._background, blob_reads, metrics,
            self.upgrade.gradients.remake,
        )  # fmt: skip
        self._records = RecordReader(self._stores, self._background, self._pools, metrics, repairer.repair_for_reader)
        self._snapshotter = Snapshotter(config, self._stores, blob_reads, repairer.repair, self._discarder.discard)
        self._recoder = Recoder(self._stores, self._writer, reads)
        self._scrubber = Scrubber(self._stores, repairer.mend, blob_reads, config.scrub_mib_per_second)
        self._upkeep = Upkeep(self._stores, self._discarder, self._nearest, reads)

    @property
    def max_upload_bytes(self) -> int:
        """The largest size of a gradient record that can be uploaded, in bytes."""
        return max_record_bytes(self._writer.spec)

    @property
    def is_current(self) -> bool:
        """False where another node has changed the collection while this one had no connection; see ``Nodes``."""
        return is_current(self._stores.catalog)

    @classmethod
    async def open(
        cls,
        config: BankConfig,
        encoder: Encoder,
        embedder: Embedder,
        cache_url: str,
        metrics: BankMetrics,
        limits_of: LimitsOf = unlimited,
        *,
        expires_history: bool = True,
    ) -> Bank:
        """Opens or creates the bank in ``config.data_dir``. No other process may have this folder.

        ``expires_history``: the bank drops past versions when their time is over. CollectionMismatchError,
        CatalogDamagedError.
        """
        bank = await asyncio.to_thread(cls, config, encoder, embedder, cache_url, metrics, limits_of)
        try:
            await bank._nearest.start()
        except BaseException:
            await bank.close()
            raise
        bank._acknowledged.advance(bank._nearest.sequence)
        bank._upkeep.start(expires_history=expires_history)
        bank._scrubber.start()
        bank._background.run(bank._discarder.sweep())
        bank._recoder.resume()
        await bank.upgrade.resume()
        if config.has_own_redis:
            bank._background.run(bank._cache.warn_where_unlimited())
        publish(metrics, bank._acknowledged, bank._nearest, bank._upkeep.eraser, bank._stores, config.data_dir)
        return bank

    async def close(self) -> None:
        """Finishes the work under way and closes every store."""
        await self._recoder.stop()
        await self._scrubber.stop()
        await self._snapshotter.stop()
        await self.upgrade.stop()  # after those that may want one of its gradients made again
        await asyncio.to_thread(self._pools.sentence_embeds.shutdown, cancel_futures=True)
        await self._background.drain()
        await self._upkeep.stop()
        await self._nearest.stop()
        await asyncio.to_thread(self._encodes.close)
        await self._discarder.close()
        await asyncio.to_thread(self._pools.shutdown)
        await asyncio.to_thread(self._stores.catalog.close)
        await self._stores.cache.close()

    # Documents in

    async def put(self, document: Document, expected_version: int | None = None) -> PutResult:
        """Stores a document with the gradient that the bank's encoder computes; durable on return.

        InvalidArgumentError for a document that has no tokens, VersionConflictError.
        """
        return await self._writer.put(document, expected_version)

    async def put_gradient(
        self, document: Document, record: bytes, embedding: Sequence[float] = (), expected_version: int | None = None
    ) -> PutResult:
        """Stores a document with a gradient record that was computed elsewhere; durable on return.

        If ``embedding`` is empty, the bank embeds the text. LearnerMismatchError, VersionConflictError,
        InvalidArgumentError for a malformed record or embedding.
        """
        return await self._writer.put_gradient(document, record, embedding, expected_version)

    async def delete(
        self, namespace: str, id: str, expected_version: int | None = None, *, purge: bool = False
    ) -> DeleteResult:
        """Deletes a document. ``purge`` erases its past versions too; see ``Writer.delete``. NotFoundError,
        VersionConflictError."""
        return await self._writer.delete(namespace, id, expected_version, purge=purge)

    # Documents and gradients out

    async def get(self, namespace: str, id: str) -> StoredDocument:
        """A document as it is stored. NotFoundError."""
        namespace, id = check_namespace(namespace), check_id(id)

        def read() -> StoredDocument:
            with self._stores.catalog.view() as view:
                stored = view.get(namespace, id)
                if stored is None:
                    view.check_namespace(namespace)
                    raise document_not_found(namespace, id)
                return stored

        return await in_thread(self._pools.reads, read)

    async def list(
        self, namespace: str, after_id: str, size: int, conditions: Sequence[Condition] = (), prefix: str = ""
    ) -> list[ListEntry]:
        """Up to ``size`` documents after ``after_id`` whose ids start with ``prefix`` and that meet all conditions, in
        order of id. NotFoundError, InvalidArgumentError."""
        namespace = check_namespace(namespace)
        check_filter(conditions)

        def read() -> list[ListEntry]:
            with self._stores.catalog.view() as view:
                view.check_namespace(namespace)
                return view.page(namespace, after_id, size, conditions, prefix)

        return await in_thread(self._pools.reads, read)

    async def query(self, query: Query) -> QueryResult:
        """Finds the nearest documents, or the named ones. Only a replica may lack a change acknowledged before.

        InvalidArgumentError, NotFoundError, LearnerMismatchError. LimitExceededError where the texts don't fit one
        message. DataLossError where a gradient is lost. OutOfRangeError where the bank no longer knows that past.
        During an upgrade OverloadedError, UnavailableError.
        """
        while True:
            result = await self._search(query)
            if not query.include_gradients:
                return result
            fitting = self._queries.fitting(result.hits)
            try:
                records = await self._records.read(fitting, query.namespace.__eq__)
                return replace(result, records=records, num_with_record=len(fitting))
            except NotFoundError:  # a hit was updated or deleted after the search: search again
                query = replace(query, at_least=None)

    async def query_batch(self, queries: Sequence[Query]) -> tuple[QueryResult, ...]:
        """Answers each query on its own state of the bank. Only a replica's may lack a change acknowledged before.

        Raises the errors of ``query``, with the query's index. LimitExceededError where the texts and gradients don't
        fit one message together.
        """
        return await answer_batch(queries, self._search, self._records)

    async def _search(self, query: Query) -> QueryResult:
        """The hits with their cue, without records."""
        for _ in range(MAX_SEARCHES):
            fingerprint = query.learner_fingerprint or self._writer.spec.fingerprint
            must_look = self.upgrade.gradients.check(fingerprint)
            try:
                vectors = await self._vectors(query)
                result = await self._cues.add(query, await self._queries.search(query, vectors), vectors)
                hits = await self.upgrade.gradients.hits(fingerprint, result.hits, must_look=must_look)
            except ReplicaReadError:
                hits = None
            if hits is not None:
                return replace(result, hits=hits, learner_fingerprint=fingerprint)
            query = replace(query, at_least=None)
        raise UnavailableError(
            f"documents must stay while their gradients are made, those found changed {MAX_SEARCHES} times; try again"
        )

    async def _vectors(self, query: Query) -> FloatArray | None:
        """The vectors to search for, (n, embedding_dimension) in float32. None where the query names its documents."""
        if query.vector:
            check_vector(query.vector, self._embedder.dimension, "vector")
            return np.asarray([query.vector], dtype=np.float32)
        if not query.text:
            return None
        await self._queries.check_namespace(query)  # before the embedder works; a search checks it by itself
        with span("bank.embed"):
            return await in_thread(self._pools.query_embeds, embedded_query, self._embedder, query.text)

    async def fetch(
        self, digests: Sequence[str], may_read: MayRead | None = None, enter: Callable[[str], None] | None = None
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Gives each digest with its verified record, in the given order.

        ``may_read`` says whether the caller may read a namespace. Gradients of other namespaces count as absent.
        ``enter`` gets each namespace of the gradients before the first read. Its errors end the fetch.
        NotFoundError before the first record, DataLossError.
        """
        check_digests(digests)
        namespaces = await self._records.check(digests, may_read)
        if enter is not None:
            for namespace in sorted(namespaces):
                enter(namespace)
        for start in range(0, len(digests), FETCH_GROUP):
            group = digests[start : start + FETCH_GROUP]
            records = await self._records.read(group, may_read)
            for digest in group:
                yield digest, records[digest]

    def snapshot(self, target: str) -> AsyncGenerator[Progress, None]:
        """Writes a snapshot of the bank as it is now; see Snapshotter."""
        return self._snapshotter.create(target)

    def recode(self, codec: str) -> AsyncGenerator[RecodeProgress, None]:
        """Gives every gradient another codec, while the bank serves; see Recoder."""
        return self._recoder.run(codec)

    async def scrub(self) -> ScrubCounts:
        """Verifies every gradient and repairs those that it can."""
        return await self._scrubber.run_once()

    async def stats(self, may_see: MayRead | None = None) -> BankStats:
        """The bank's figures. With ``may_see``, they count only the namespaces that the caller may see, and leave
        cache and disk out."""
        identity = replace(
            self._identity,
            codec=self._writer.codec,
            learner_fingerprint=self._writer.spec.fingerprint,
            layout_id=self._writer.spec.layout_id,
        )
        indexed = self._nearest.sequence
        return await read_stats(self._stores, self._pools.reads, identity, indexed, self._data_dir, may_see)
