"""Makes changes durable, and only then acknowledges them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from bank_service.catalog.entries import DeleteResult, SentenceVectors
from bank_service.errors import BankError, DataLossError, UnavailableError
from bank_service.records.discarder import Discarder
from bank_service.records.stores import Pools, Stores
from bank_service.runtime.acknowledged import AcknowledgedSequence
from bank_service.runtime.background import Background, finished
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import Document, Gradient, PutResult
from bank_service.wire.record import (
    GradientFormatError,
    GradientSpec,
    decode_gradient,
    encode_gradient,
    read_header,
    record_digest,
)
from bank_service.wire.tracing import span

T = TypeVar("T")


class LearnerChangedError(Exception):
    """The collection has another learner than the gradient. The caller must encode the document again."""


class Committer:
    """Writes the blob, then the catalog, then acknowledges. The caller must have the document's lock.

    A write goes on to its end if its caller is cancelled, because a committed change must reach the index. The caller
    keeps the document's lock until then, so the next write of the document comes after it.
    """

    def __init__(
        self,
        stores: Stores,
        discarder: Discarder,
        pools: Pools,
        background: Background,
        spec: GradientSpec,
        codec: str,
        room: Callable[[], Awaitable[None]],
        acknowledged: AcknowledgedSequence,
    ) -> None:
        """``room`` returns when a document may be stored."""
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._discarder = discarder
        self._pool = pools.writes
        self._blob_pool = pools.blob_writes
        self._background = background
        self.spec = spec
        self.codec = codec
        self._room = room
        self.acknowledged = acknowledged
        self._storing: set[asyncio.Task[Any]] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()

    async def store(
        self,
        document: Document,
        gradient: Gradient,
        record: bytes | None,
        expected_version: int | None,
        sentences: SentenceVectors | None = None,
        *,
        spec: GradientSpec,
    ) -> PutResult:
        """Stores a document. ``record`` is None if its gradient is stored already. ``sentences``: see ``Catalog.put``.

        ``spec``: of the gradient. LearnerChangedError where the collection has another learner now.
        VersionConflictError, QuotaExceededError, UnavailableError if the blob store can't be written.
        """
        await self._room()
        await self._is_open.wait()
        if spec != self.spec:
            raise LearnerChangedError
        with span("bank.store"):
            return await self.kept(self._store(document, gradient, record, expected_version, sentences))

    async def kept(self, store: Coroutine[Any, Any, T]) -> T:
        """Stores to the end, even if the caller is cancelled. ``halted`` and purges wait for it."""
        task = self._background.run(store)
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)
        return await finished(task)

    async def delete(self, namespace: str, id: str, expected_version: int | None, *, purge: bool) -> DeleteResult:
        """Deletes a document. NotFoundError, VersionConflictError; with ``purge`` UnavailableError where a gradient
        can't be removed."""
        return await finished(self._background.run(self._delete(namespace, id, expected_version, purge)))

    async def change_codec(self, codec: str) -> None:
        """Changes the codec of later writes. Returns when no earlier write is under way."""
        self.codec = codec
        await self._written()

    @asynccontextmanager
    async def halted(self) -> AsyncIterator[None]:
        """Begins when no write of a document is under way. Later ones wait for the end of the block."""
        self._is_open.clear()
        try:
            await self._written()
            yield
        finally:
            self._is_open.set()

    async def _written(self) -> None:
        if storing := list(self._storing):
            await asyncio.wait(storing)

    async def _store(
        self,
        document: Document,
        gradient: Gradient,
        record: bytes | None,
        expected_version: int | None,
        sentences: SentenceVectors | None,
    ) -> PutResult:
        try:
            while record is not None and read_header(record).codec != (codec := self.codec):
                # The record was encoded before the collection's codec changed.
                record = await in_thread(self._pool, _recoded, record, self.spec, codec)
                gradient = replace(gradient, digest=record_digest(record), num_bytes=len(record))
            result = await self._write(document, gradient, record, expected_version, sentences)
        except BankError:
            if record is not None:  # without this, uploads that the catalog refuses would fill the disk
                self._background.run(self._discarder.discard([gradient.digest]))
            raise
        self.acknowledged.advance(result.stored.sequence)
        if result.dropped:
            self._background.run(self._discarder.discard(result.dropped))
        return result

    async def _delete(self, namespace: str, id: str, expected_version: int | None, purge: bool) -> DeleteResult:
        result = await in_thread(self._pool, self._delete_row, namespace, id, expected_version, purge)
        self.acknowledged.advance(result.sequence)
        if purge:
            await self._written()  # a gradient of the purged text that is being stored is discarded by then
            await self._discarder.erase(result.digests)
        else:
            self._background.run(self._discarder.discard(result.digests))
        return result

    async def _write(
        self,
        document: Document,
        gradient: Gradient,
        record: bytes | None,
        expected_version: int | None,
        sentences: SentenceVectors | None,
    ) -> PutResult:
        with self._blobs.hold(gradient.digest):
            if record is not None:
                await in_thread(self._blob_pool, self._write_blob, gradient.digest, record)
            # The commit is awaited without a thread, so any number of writes can share one commit.
            with span("catalog.put"):
                return await asyncio.wrap_future(self._catalog.put(document, gradient, expected_version, sentences))

    def _write_blob(self, digest: str, record: bytes) -> None:
        with span("blobs.put", record_bytes=len(record)):
            try:
                self._blobs.put(digest, record)
            except OSError as error:
                raise UnavailableError(f"the blob store must be writable, got {error}") from error

    def _delete_row(self, namespace: str, id: str, expected_version: int | None, purge: bool) -> DeleteResult:
        with self._catalog.view() as view:
            view.check_namespace(namespace)
        with span("catalog.delete"):
            return self._catalog.delete(namespace, id, expected_version, purge=purge).result()


def _recoded(record: bytes, spec: GradientSpec, codec: str) -> bytes:
    try:
        return encode_gradient(decode_gradient(record, spec), spec, codec)
    except GradientFormatError as error:
        raise DataLossError(
            f"a stored gradient can't be given the codec {codec}: {error}; ingest its document again",
            digest=record_digest(record),
        ) from error
