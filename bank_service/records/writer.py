"""Checks documents and gradients, encodes documents, and passes both to the committer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bank_service.catalog.entries import DeleteResult, SentenceVectors
from bank_service.catalog.failures import version_conflict
from bank_service.errors import InvalidArgumentError, LearnerMismatchError
from bank_service.records.committer import Committer, LearnerChangedError
from bank_service.records.encode_queue import EncodeQueue
from bank_service.records.sentence_embedding import embed_sentences
from bank_service.records.stores import Pools, Stores
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
from bank_service.values.encoder import Encoder
from bank_service.values.vectors import unit
from bank_service.wire.record import (
    FloatArray,
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

UPLOADED = 0  # the number of tokens stored for an uploaded gradient; an encoded one has at least one token


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A comparison of a new document with the stored one of the same id."""

    stored: StoredDocument | None  # None: there is none with a sound gradient
    is_encoded: bool  # the bank's encoder made the gradient; it was not uploaded
    has_text: bool  # title and text are the same
    has_content: bool  # title, text and metadata are the same

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
        committer: Committer,
        pools: Pools,
        encodes: EncodeQueue,
        embedder: Embedder,
        spec: GradientSpec,
        max_pending: int,
        *,
        sentences: bool,
    ) -> None:
        """``max_pending``: documents being encoded and stored at once. ``sentences``: embeds each document's."""
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._committer = committer
        self._pools = pools
        self._encodes = encodes
        self._embedder = embedder
        self.spec = spec  # of the gradients of later writes
        self._has_sentences = sentences
        self._locks = KeyedLocks()
        self._pending = asyncio.Semaphore(max_pending)

    @property
    def codec(self) -> str:
        """The codec of later writes."""
        return self._committer.codec

    async def put(self, document: Document, expected_version: int | None = None) -> PutResult:
        """Stores a document with the gradient that the bank's encoder computes; durable on return.

        The same content again is not encoded again. A change of metadata alone keeps the gradient. An uploaded gradient
        is replaced, because the bank can't know whether it belongs to the text.
        InvalidArgumentError for a document that has no tokens, VersionConflictError.
        """
        async with self._locks.lock((document.namespace, document.id)), self._pending:
            return await self._of_learner(lambda spec: self._put(document, expected_version, spec))

    async def _put(self, document: Document, expected_version: int | None, spec: GradientSpec) -> PutResult:
        current = await in_thread(self._pools.blob_reads, self._compare, document, expected_version)
        if current.has_content and current.is_encoded:
            return self._unchanged(current.stored)
        if current.has_text and current.is_encoded and current.stored is not None:
            return await self._committer.store(document, current.stored.gradient, None, expected_version, spec=spec)
        with span("bank.encode"):
            encoded, (embedding, sentences) = await asyncio.gather(
                asyncio.wrap_future(self._encodes.submit(document.title, document.text)),
                in_thread(self._pools.document_embeds, self._embed_document, document, self._has_sentences),
            )
        gradient = await in_thread(
            self._pools.reads, _gradient, encoded.record, embedding, encoded.num_tokens, encoded.truncated
        )
        return await self._committer.store(document, gradient, encoded.record, expected_version, sentences, spec=spec)

    async def put_gradient(
        self, document: Document, record: bytes, embedding: Sequence[float] = (), expected_version: int | None = None
    ) -> PutResult:
        """Stores a document with a gradient record that was computed elsewhere; durable on return.

        A record of another codec is given the collection's. If ``embedding`` is empty, the bank embeds the text.
        Sentences are embedded at their first cue, because that would take longer than all the rest here.
        LearnerMismatchError, VersionConflictError, InvalidArgumentError for a malformed record or embedding.
        """
        if embedding:
            check_vector(embedding, self._embedder.dimension, "header.embedding")

        def check(spec: GradientSpec) -> tuple[bytes, float, _Comparison]:
            return *self._storable(record, spec), self._compare(document, expected_version)

        async def put(spec: GradientSpec) -> PutResult:
            storable, error, current = await in_thread(self._pools.blob_reads, check, spec)
            if embedding:
                vector = unit(np.asarray(embedding, dtype=np.float32)).astype("<f4").tobytes()
            else:
                vector, _ = await in_thread(self._pools.document_embeds, self._embed_document, document, False)
            gradient = _gradient(storable, vector, UPLOADED, truncated=False)
            if current.has_content and current.has_gradient(gradient):
                result = self._unchanged(current.stored)
            else:
                result = await self._committer.store(document, gradient, storable, expected_version, spec=spec)
            return replace(result, relative_error=error)

        async with self._locks.lock((document.namespace, document.id)), self._pending:
            return await self._of_learner(put)

    async def delete(
        self, namespace: str, id: str, expected_version: int | None = None, *, purge: bool = False
    ) -> DeleteResult:
        """Deletes a document; durable on return. NotFoundError, VersionConflictError.

        ``purge`` also removes its past versions. A deleted document can still be purged. The gradients are removed on
        return, and other traces are erased soon after; see ``Eraser``. UnavailableError if a gradient can't be removed.
        """
        namespace, id = check_namespace(namespace), check_id(id)
        async with self._locks.lock((namespace, id)):
            return await self._committer.delete(namespace, id, expected_version, purge=purge)

    async def change_learner(self, encoder: Encoder, commit: Callable[[], Awaitable[bool]]) -> bool:
        """Changes the learner of later writes if ``commit`` has changed that of the collection. Returns its answer.

        No document is written meanwhile. Writes under way encode their document again.
        """
        async with self._committer.halted():
            if not await commit():
                return False
            self.spec = self._committer.spec = encoder.spec
            self._encodes.encoder = encoder
            return True

    async def store_next(self, store: Coroutine[Any, Any, None]) -> None:
        """Stores a gradient of the next learner; see ``Committer.kept``."""
        await self._committer.kept(store)

    async def _of_learner(self, put: Callable[[GradientSpec], Awaitable[PutResult]]) -> PutResult:
        """Calls ``put`` with the collection's learner, again if that changes meanwhile."""
        while True:
            try:
                return await put(self.spec)
            except LearnerChangedError:
                continue

    async def change_codec(self, codec: str) -> None:
        """Changes the codec of later writes. Returns when no earlier write is under way."""
        self._encodes.codec = codec
        await self._committer.change_codec(codec)

    async def recode(self, namespace: str, id: str) -> bool:
        """Stores a document's gradient in the collection's codec, as a new version. False if it has that codec already,
        or if the document is gone. DataLossError, QuotaExceededError."""
        async with self._locks.lock((namespace, id)), self._pending:
            stored = await in_thread(self._pools.reads, self._stored, namespace, id)
            if stored is None:
                return False
            record = await in_thread(self._pools.blob_reads, self._blobs.get, stored.gradient.digest)
            if read_header(record).codec == self.codec:
                return False
            await self._committer.store(stored.document, stored.gradient, record, stored.version, spec=self.spec)
            return True

    def _stored(self, namespace: str, id: str) -> StoredDocument | None:
        with self._catalog.view() as view:
            return view.get(namespace, id)

    def _compare(self, document: Document, expected_version: int | None) -> _Comparison:
        """Reads the catalog before the costly work. VersionConflictError, QuotaExceededError."""
        with self._catalog.view() as view:
            stored = view.get(document.namespace, document.id)
            version = 0 if stored is None else stored.version
            if expected_version is not None and version != expected_version:
                raise version_conflict(document.namespace, document.id, expected_version, version)
            self._catalog.check_room(view, document, stored)
        # A document with a lost gradient counts as new, so that ingesting it again repairs it.
        if stored is None or not self._blobs.is_stored(stored.gradient.digest, stored.gradient.num_bytes):
            return _Comparison(None, is_encoded=False, has_text=False, has_content=False)
        return _Comparison(
            stored,
            is_encoded=stored.gradient.num_tokens != UPLOADED,
            has_text=stored.document.text_digest == document.text_digest,
            has_content=stored.document.content_digest == document.content_digest,
        )

    def _unchanged(self, stored: StoredDocument | None) -> PutResult:
        assert stored is not None
        self._committer.acknowledged.advance(stored.sequence)
        return PutResult(stored, Outcome.UNCHANGED)

    def _embed_document(self, document: Document, with_sentences: bool) -> tuple[bytes, SentenceVectors | None]:
        """The document's vector. ``with_sentences``: also those of its sentences."""
        with span("bank.embed"):
            vector = self._embedder.embed(embedded_text(document.title, document.text))
            sentences = None
            if with_sentences:
                sentences = embed_sentences(self._embedder, document.title, document.text, vector)
            return vector.astype("<f4").tobytes(), sentences

    def _storable(self, record: bytes, spec: GradientSpec) -> tuple[bytes, float]:
        """Verifies an uploaded record. (the record in the collection's codec, its relative error).

        LearnerMismatchError, InvalidArgumentError.
        """
        try:
            if verify_record(record, spec).codec == self.codec:
                return record, 0.0
            given = decode_gradient(record, spec)
            stored = encode_gradient(given, spec, self.codec)
        except WrongLearnerError as error:
            raise LearnerMismatchError(str(error), expected=error.expected, actual=error.actual) from error
        except GradientFormatError as error:
            raise InvalidArgumentError(f"the gradient record is malformed: {error}", field="chunk") from error
        return stored, _relative_error(decode_gradient(stored, spec), given)


def _relative_error(stored: FloatArray, given: FloatArray) -> float:
    """‖stored − given‖ / ‖given‖, and 0 for two vectors of zeros. The sums are in float64."""
    size = float(np.linalg.norm(given.astype(np.float64)))
    return float(np.linalg.norm(stored.astype(np.float64) - given)) / size if size else 0.0


def _gradient(record: bytes, embedding: bytes, num_tokens: int, truncated: bool) -> Gradient:
    return Gradient(record_digest(record), len(record), num_tokens, truncated, embedding)
