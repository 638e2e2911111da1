"""The gradients of the next learner, while a collection is on its way to it; see ``LearnerUpgrade``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from bank_service.catalog.entries import NextLearner, VersionText
from bank_service.errors import (
    BankError,
    InvalidArgumentError,
    LearnerMismatchError,
    OverloadedError,
    UnavailableError,
)
from bank_service.records.discarder import Discarder
from bank_service.records.encode_queue import EncodedRecord, EncodeQueue
from bank_service.records.stores import Pools, Stores
from bank_service.records.writer import Writer
from bank_service.runtime.background import Background
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import Gradient, Hit
from bank_service.values.encoder import Encoder
from bank_service.wire.limits import RETRY_AFTER_MS
from bank_service.wire.record import record_digest

MAX_LATE = 32  # versions that are encoded or wait for that; one more query may add its hits
_ENDED = "the upgrade to another learner has just ended; try again"


class NextGradients:
    """Encodes versions of documents with the next learner, and gives hits the gradients of either learner."""

    def __init__(
        self,
        stores: Stores,
        writer: Writer,
        discarder: Discarder,
        background: Background,
        pools: Pools,
        make_queue: Callable[[Encoder], EncodeQueue],
    ) -> None:
        """``make_queue``: starts a queue with an encoder."""
        self._catalog = stores.catalog
        self._blobs = stores.blobs
        self._writer = writer
        self._discarder = discarder
        self._background = background
        self._pool = pools.reads
        self._blob_pool = pools.blob_writes
        self._make_queue = make_queue
        self.learner: NextLearner | None = None  # None: there is no upgrade
        self.encoder: Encoder | None = None  # None: not loaded yet, or it can't be loaded
        self.problem = ""  # the reason why it can't be loaded
        self.failed: dict[int, str] = {}  # version → the reason why it can't ever be encoded
        self._queue: EncodeQueue | None = None
        self._is_decided = asyncio.Event()  # the encoder is loaded, or there is a problem
        self._running: dict[int, asyncio.Task[None]] = {}  # version → the encoding under way
        self._queued: set[Future[EncodedRecord]] = set()

    def open(self, encoder: Encoder) -> None:
        """Starts the encoder of the next learner."""
        self.encoder, self._queue = encoder, self._make_queue(encoder)
        self._is_decided.set()

    def fail(self, problem: str) -> None:
        """There will be no encoder."""
        self.problem = problem
        self._is_decided.set()

    async def close(self) -> None:
        """Ends the encodings under way and forgets the next learner."""
        self.learner = None  # from here on no version is encoded
        self._is_decided.set()  # nobody waits any longer
        while self._running:
            for future in self._queued:
                future.cancel()  # has no effect on those that the encoder works at
            await asyncio.wait(list(self._running.values()))
        if self._queue is not None:
            await asyncio.to_thread(self._queue.close)
        self.encoder = self._queue = None
        self.problem = ""
        self.failed.clear()
        self._is_decided.clear()

    def check(self, fingerprint: str) -> bool:
        """Whether hits need a look for their gradients, because there is an upgrade. LearnerMismatchError for a learner
        that is neither the collection's nor the next one."""
        known = [self._writer.spec.fingerprint, *([self.learner.fingerprint] if self.learner else [])]
        if fingerprint not in known:
            raise LearnerMismatchError(
                f"learner_fingerprint must be the collection's {' or '.join(known)}, got {fingerprint[:80]}",
                expected=known[0],
                actual=fingerprint[:80],
            )
        return len(known) > 1

    async def hits(self, fingerprint: str, hits: tuple[Hit, ...], *, must_look: bool) -> tuple[Hit, ...] | None:
        """The hits with their gradients of a learner. Encodes those that lack. ``must_look``: the answer of ``check``
        before the search.

        None: search again, because the learners or a document have changed. OverloadedError, and UnavailableError where
        a gradient can't be made now.
        """
        if not must_look and fingerprint == self._writer.spec.fingerprint:
            return hits
        began = [hit.sequence for hit in hits]
        found = await in_thread(self._pool, self._named, fingerprint, began)
        if found is not None and self.learner is not None and fingerprint == self.learner.fingerprint:
            lacking = [one for one in began if one not in found]
            if len(self._running) >= MAX_LATE and not self._running.keys() >= set(lacking):
                raise OverloadedError(
                    f"the bank makes {MAX_LATE} gradients of the next learner at a time and has as many; try again "
                    "later, or when the upgrade is level",
                    limit="max_late_gradients",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            await self.encode(lacking)
            found = await in_thread(self._pool, self._named, fingerprint, began)
        if found is None or any(one not in found for one in began):
            return None
        named = [found[one] for one in began]
        return tuple(
            replace(hit, gradient_digest=digest, gradient_bytes=size)
            for hit, (digest, size) in zip(hits, named, strict=True)
        )

    async def remake(self, digest: str, limit: int) -> bool:
        """Encodes up to ``limit`` versions that have this gradient again. False if there is none. UnavailableError."""
        began = await in_thread(self._pool, self._owners, digest, limit)
        await self.encode(began, anew=True)
        return bool(began)

    async def encode(self, began: Sequence[int], *, anew: bool = False) -> None:
        """Gives these versions their gradients. Callers of the same version share one encoding. ``anew``: also those
        that have one.

        UnavailableError, when all have ended.
        """
        for one in began:
            if one not in self._running:
                self._running[one] = task = self._background.run(self._make(one, anew))
                task.add_done_callback(partial(self._ended, one))
        tasks = [asyncio.shield(self._running[one]) for one in began]
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def _ended(self, began: int, _: asyncio.Task[None]) -> None:
        del self._running[began]

    async def _make(self, began: int, anew: bool) -> None:
        if self.learner is not None:
            await self._is_decided.wait()
        learner, queue = self.learner, self._queue
        if learner is None or queue is None:
            raise UnavailableError(self.problem or _ENDED)
        text = await in_thread(self._pool, self._text, learner.fingerprint, began, anew)
        if text is None:
            return
        try:
            encoded = await self._encoded(queue, text)
        except UnavailableError:  # the bank is stopping, or the upgrade ends
            raise
        except BankError as error:
            problem = f"the version of sequence {began} can't be encoded by the next learner: {error}"
            if isinstance(error, InvalidArgumentError):  # else another try may succeed
                self.failed[began] = problem
            raise UnavailableError(problem) from error
        await self._writer.store_next(self._store(learner.fingerprint, began, encoded))
        self.failed.pop(began, None)

    async def _encoded(self, queue: EncodeQueue, text: VersionText) -> EncodedRecord:
        if self.learner is None:
            raise UnavailableError(_ENDED)
        future = queue.submit(text.title, text.text)
        self._queued.add(future)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            raise UnavailableError(_ENDED) from None
        finally:
            self._queued.discard(future)

    async def _store(self, fingerprint: str, began: int, encoded: EncodedRecord) -> None:
        if await in_thread(self._pool, self._text, fingerprint, began, True) is None:
            return  # from here on, a purge waits for this to end
        record = encoded.record
        made = Gradient(record_digest(record), len(record), encoded.num_tokens, encoded.truncated, b"")
        with self._blobs.hold(made.digest):
            try:
                await in_thread(self._blob_pool, self._blobs.put, made.digest, record)
            except OSError as error:
                raise UnavailableError(f"the blob store must be writable, got {error}") from error
            unwanted = await asyncio.wrap_future(self._catalog.put_next(fingerprint, began, made))
        await self._discarder.discard(unwanted)

    def _named(self, fingerprint: str, began: Sequence[int]) -> dict[int, tuple[str, int]] | None:
        with self._catalog.view() as view:
            return view.gradients_of(fingerprint, began)

    def _owners(self, digest: str, limit: int) -> list[int]:
        with self._catalog.view() as view:
            return view.next_owners(digest, limit)

    def _text(self, fingerprint: str, began: int, anew: bool) -> VersionText | None:
        """None: the version is gone, or has its gradient and needs none anew."""
        with self._catalog.view() as view:
            if not anew and began in (view.gradients_of(fingerprint, [began]) or ()):
                return None
            return view.texts([began]).get(began)
