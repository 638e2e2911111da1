"""Documents and gradients into the bank: each change is durable before it is acknowledged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bank_service.catalog.entries import DeleteResult
from bank_service.catalog.failures import version_conflict
from bank_service.errors import BankError, DataLossError, InvalidArgumentError, LearnerMismatchError, UnavailableError
from bank_service.records.discarder import Discarder
from bank_service.records.encode_queue import EncodeQueue
from bank_service.records.stores import Pools, Stores
from bank_service.runtime.background import Background, finished
from bank_service.runtime.locks import KeyedLocks
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import (
    Document,
    Gradient,
    Outcome,
    PutResult,
    StoredDocument,
    check_id,
    check_namespace,
    check_vector,
)
from bank_service.values.embedder import Embedder, embedded_text
from bank_service.values.vectors import unit
from bank_service.wire.codec import (
    GradientFormatError,
    GradientSpec,
    WrongLearnerError,
    decode_gradient,
    encode_gradient,
    read_header,
    record_digest,
    verify_record,
)
from bank_service.wire.tracing import span

logger = logging.getLogger(__name__)

UPLOADED = 0  # tokens of a gradient that was computed elsewhere: unknown; an encoder's own has at least one


@dataclass(frozen=True, slots=True)
class _Standing:
    """A document that is to be written, against what is stored under its id."""

    stored: StoredDocument | None  # None: nothing, or nothing with a sound gradient
    is_encoded: bool  # the gradient is the bank's own, not one that was uploaded
    has_text: bool  # title and text are the same
    has_content: bool  # the metadata, too

    def has_gradient(self, gradient: Gradient) -> bool:
        stored = self.stored
        return stored is not None and (stored.gradient.digest, stored.gradient.embedding) == (
            gradient.digest,
            gradient.embedding,
        )


class Writer:
    """Puts and deletes documents. Changes of one document happen one after the other, in order of arrival."""

    def __init__(
        self,
        stores: Stores,
        discarder: Discarder,
        pools: Pools,
        background: Background,
        encodes: EncodeQueue,
        embedder: Embedder,
        spec: GradientSpec,
        codec: str,
        max_pending: int,
        room: Callable[[], Awaitable[None]],
        acknowledge: Callable[[int], None],
    ) -> None:
        """``room`` returns when a document may be stored. ``acknowledge`` is told the sequence of each change before
        its caller is."""
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._discarder = discarder
        self._pools = pools
        self._background = background
        self._encodes = encodes
        self._embedder = embedder
        self._spec = spec
        self.codec = codec
        self._room = room
        self._acknowledge = acknowledge
        self._locks = KeyedLocks()
        self._pending = asyncio.Semaphore(max_pending)
        self._storing: set[asyncio.Task[PutResult]] = set()

    async def put(self, document: Document, expected_version: int | None = None) -> PutResult:
        """Stores a document with the gradient that the bank's encoder computes; durable on return.

        The same content again costs nothing; a change of metadata alone keeps the gradient. One that was uploaded
        is replaced: nobody but its uploader knows whether it belongs to the text.
        InvalidArgumentError for a document that has no tokens, VersionConflictError.
        """
        async with self._locks.lock((document.namespace, document.id)), self._pending:
            current = await in_thread(self._pools.reads, self._standing, document, expected_version)
            if current.has_content and current.is_encoded:
                return self._unchanged(current.stored)
            if current.has_text and current.is_encoded and current.stored is not None:
                return await self._store(document, current.stored.gradient, None, expected_version)
            with span("bank.encode"):
                encoded, embedding = await asyncio.gather(
                    asyncio.wrap_future(self._encodes.submit(document.title, document.text)),
                    in_thread(self._pools.document_embeds, self._embed_document, document),
                )
            gradient = await in_thread(
                self._pools.reads, _gradient, encoded.record, embedding, encoded.num_tokens, encoded.truncated
            )
            return await self._store(document, gradient, encoded.record, expected_version)

    async def put_gradient(
        self, document: Document, record: bytes, embedding: Sequence[float] = (), expected_version: int | None = None
    ) -> PutResult:
        """Stores a document with a gradient record that was computed elsewhere; durable on return.

        ``embedding``: empty, then the bank embeds the text. LearnerMismatchError, InvalidArgumentError for a
        malformed record or embedding, VersionConflictError.
        """
        if embedding:
            check_vector(embedding, self._embedder.dimension, "header.embedding")

        def check() -> tuple[str, _Standing]:
            return self._check_record(record), self._standing(document, expected_version)

        async with self._locks.lock((document.namespace, document.id)), self._pending:
            digest, current = await in_thread(self._pools.reads, check)
            if embedding:
                vector = unit(np.asarray(embedding, dtype=np.float32)).astype("<f4").tobytes()
            else:
                vector = await in_thread(self._pools.document_embeds, self._embed_document, document)
            gradient = Gradient(digest, len(record), UPLOADED, False, vector)
            if current.has_content and current.has_gradient(gradient):
                return self._unchanged(current.stored)
            return await self._store(document, gradient, record, expected_version)

    async def delete(
        self, namespace: str, id: str, expected_version: int | None = None, *, purge: bool = False
    ) -> DeleteResult:
        """Deletes a document; durable on return. NotFoundError, VersionConflictError.

        ``purge``: what it was before, too, also where it is deleted already; its gradients are gone on return, and what
        the bank's files still hold of it soon after; see Eraser. UnavailableError where a gradient can't be removed.
        """
        namespace, id = check_namespace(namespace), check_id(id)
        async with self._locks.lock((namespace, id)):
            return await finished(self._background.run(self._commit_deletion(namespace, id, expected_version, purge)))

    async def change_codec(self, codec: str) -> None:
        """Returns when nothing can be stored in another codec any more."""
        self.codec = self._encodes.codec = codec
        storing = list(self._storing)
        if storing:
            await asyncio.wait(storing)

    async def recode(self, namespace: str, id: str) -> bool:
        """Gives a document its gradient in the collection's codec, as a new version; False where it has that, or is
        gone. DataLossError, QuotaExceededError."""
        async with self._locks.lock((namespace, id)), self._pending:
            stored = await in_thread(self._pools.reads, self._stored, namespace, id)
            if stored is None:
                return False
            record = await in_thread(self._pools.reads, self._blobs.get, stored.gradient.digest)
            if read_header(record).codec == self.codec:
                return False
            await self._store(stored.document, stored.gradient, record, stored.version)
            return True

    def _stored(self, namespace: str, id: str) -> StoredDocument | None:
        with self._catalog.view() as view:
            return view.get(namespace, id)

    def _standing(self, document: Document, expected_version: int | None) -> _Standing:
        """What the catalog has of the document now. VersionConflictError, QuotaExceededError, before any work."""
        with self._catalog.view() as view:
            stored = view.get(document.namespace, document.id)
            version = 0 if stored is None else stored.version
            if expected_version is not None and version != expected_version:
                raise version_conflict(document.namespace, document.id, expected_version, version)
            self._catalog.check_room(view, document, stored)
        # Content whose gradient got lost is taken as new: ingesting it again is how it is healed.
        if stored is None or not self._blobs.is_sound(stored.gradient.digest):
            return _Standing(None, is_encoded=False, has_text=False, has_content=False)
        return _Standing(
            stored,
            is_encoded=stored.gradient.num_tokens != UPLOADED,
            has_text=stored.document.text_digest == document.text_digest,
            has_content=stored.document.content_digest == document.content_digest,
        )

    def _unchanged(self, stored: StoredDocument | None) -> PutResult:
        assert stored is not None
        self._acknowledge(stored.sequence)
        return PutResult(stored, Outcome.UNCHANGED)

    async def _store(
        self, document: Document, gradient: Gradient, record: bytes | None, expected_version: int | None
    ) -> PutResult:
        await self._room()
        # A caller that goes away stops nothing from here on: what is committed must reach the index, and the next
        # write of the document, which waits for its lock, must come after it.
        with span("bank.store"):
            task = self._background.run(self._commit(document, gradient, record, expected_version))
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)
            return await finished(task)

    async def _commit(
        self, document: Document, gradient: Gradient, record: bytes | None, expected_version: int | None
    ) -> PutResult:
        try:
            while record is not None and read_header(record).codec != (codec := self.codec):
                # Made before the collection's codec changed.
                record = await in_thread(self._pools.writes, _recoded, record, self._spec, codec)
                gradient = replace(gradient, digest=record_digest(record), num_bytes=len(record))
            result = await self._write(document, gradient, record, expected_version)
        except BankError:
            if record is not None:  # written before the catalog refused it: else refused uploads would fill the disk
                self._background.run(self._discarder.discard([gradient.digest]))
            raise
        self._acknowledge(result.stored.sequence)
        if result.replaced_digest is not None:
            self._background.run(self._discarder.discard([result.replaced_digest]))
        return result

    async def _commit_deletion(
        self, namespace: str, id: str, expected_version: int | None, purge: bool
    ) -> DeleteResult:
        result = await in_thread(self._pools.writes, self._delete, namespace, id, expected_version, purge)
        self._acknowledge(result.sequence)
        if result.erasure is None:
            self._background.run(self._discarder.discard(result.digests))
        else:
            await self._discarder.erase(result.digests)
            await asyncio.wrap_future(self._catalog.acknowledge_purge(result.erasure))
        return result

    async def _write(
        self, document: Document, gradient: Gradient, record: bytes | None, expected_version: int | None
    ) -> PutResult:
        with self._blobs.hold(gradient.digest):
            if record is not None:
                await in_thread(self._pools.writes, self._write_blob, gradient.digest, record)
            # No thread waits for the commit: as many writes share one as there are on the way.
            with span("catalog.put"):
                return await asyncio.wrap_future(self._catalog.put(document, gradient, expected_version))

    def _write_blob(self, digest: str, record: bytes) -> None:
        with span("blobs.put", record_bytes=len(record)):
            try:
                self._blobs.put(digest, record)
            except OSError as error:
                raise UnavailableError(f"the blob store must be writable, got {error}") from error

    def _delete(self, namespace: str, id: str, expected_version: int | None, purge: bool) -> DeleteResult:
        with self._catalog.view() as view:
            view.check_namespace(namespace)
        with span("catalog.delete"):
            return self._catalog.delete(namespace, id, expected_version, purge=purge).result()

    def _embed_document(self, document: Document) -> bytes:
        with span("bank.embed"):
            return self._embedder.embed(embedded_text(document.title, document.text)).astype("<f4").tobytes()

    def _check_record(self, record: bytes) -> str:
        """The digest of a sound record of this collection."""
        try:
            header = verify_record(record, self._spec)
        except WrongLearnerError as error:
            raise LearnerMismatchError(str(error), expected=error.expected, actual=error.actual) from error
        except GradientFormatError as error:
            raise InvalidArgumentError(f"the gradient record is malformed: {error}", field="chunk") from error
        if header.codec != self.codec:
            raise InvalidArgumentError(
                f"the gradient record's codec must be the collection's {self.codec}, got {header.codec}",
                field="chunk",
            )
        return record_digest(record)


def _recoded(record: bytes, spec: GradientSpec, codec: str) -> bytes:
    try:
        return encode_gradient(decode_gradient(record, spec), spec, codec)
    except GradientFormatError as error:
        raise DataLossError(
            f"a stored gradient can't be given the codec {codec}: {error}; ingest its document again",
            digest=record_digest(record),
        ) from error


def _gradient(record: bytes, embedding: bytes, num_tokens: int, truncated: bool) -> Gradient:
    return Gradient(record_digest(record), len(record), num_tokens, truncated, embedding)
