"""Encodes a document's text again if its gradient is lost or damaged on disk.

Only a gradient of the bank's encoder can be repaired, not an uploaded one. If the encoder gives the same record, the
document does not change. If it gives another record, that becomes a new version of the document, in one commit. So a
document's gradient always comes from its text.

Past versions are repaired in the same way, in the collection's present codec. If that gives another record, ``as_of``
answers with the new record. Then only its digest shows that the old gradient is lost.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from bank_service.errors import BankError, UnavailableError, VersionConflictError
from bank_service.records.discarder import Discarder
from bank_service.records.encode_queue import EncodeQueue
from bank_service.records.stores import Stores
from bank_service.records.writer import UPLOADED, Writer
from bank_service.runtime.background import Background
from bank_service.runtime.metrics import BankMetrics
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import Gradient, StoredDocument
from bank_service.wire.record import record_digest

logger = logging.getLogger(__name__)

WAIT_SECONDS = 10.0  # the longest that a reader waits for a repair, which continues without it
MAX_OWNERS = 64  # documents of one gradient that are written again; one is enough if the record is the same


class Mended(enum.Enum):
    """The outcome of a repair."""

    MADE = enum.auto()  # the record is sound again, or its documents have another one
    GONE = enum.auto()  # no document names it any more
    LOST = enum.auto()


class Repairer:
    """Repairs gradients. Several readers of a damaged gradient share one repair."""

    def __init__(
        self,
        stores: Stores,
        writer: Writer,
        discarder: Discarder,
        encodes: EncodeQueue,
        background: Background,
        pool: Executor,
        metrics: BankMetrics,
        remake_next: Callable[[str, int], Awaitable[bool]],
    ) -> None:
        """``remake_next``: see ``NextGradients.remake``."""
        self._stores = stores
        self._writer = writer
        self._discarder = discarder
        self._encodes = encodes
        self._background = background
        self._pool = pool
        self._metrics = metrics
        self._remake_next = remake_next
        self._running: dict[str, asyncio.Task[Mended]] = {}

    async def repair_for_reader(self, digest: str) -> bool:
        """Does the same as ``repair``. UnavailableError if it takes longer than WAIT_SECONDS. The repair then
        continues."""
        try:
            return await asyncio.wait_for(self.repair(digest), WAIT_SECONDS)
        except TimeoutError:
            raise UnavailableError(
                f"gradient {digest} was damaged and is being made again from its document's text; try again later"
            ) from None

    async def repair(self, digest: str) -> bool:
        """Repairs a gradient. True if the record is sound again, or if no document names it any more. False if it is
        lost."""
        return await self.mend(digest) is not Mended.LOST

    async def mend(self, digest: str) -> Mended:
        """Does the same as ``repair``, and returns the outcome."""
        task = self._running.get(digest)
        if task is None:
            task = self._background.run(self._repair(digest))
            self._running[digest] = task
            task.add_done_callback(lambda _: self._running.pop(digest, None))
        return await asyncio.shield(task)

    async def _repair(self, digest: str) -> Mended:
        if await self._remake_next(digest, MAX_OWNERS):
            self._metrics.repaired()
            logger.warning("gradient %s of the next learner was damaged; made again from the text", digest)
            return Mended.MADE
        is_made = False
        owners = await in_thread(self._pool, self._owners, digest)
        for stored in owners:
            if stored.gradient.num_tokens == UPLOADED:
                continue
            try:
                # The writer treats a document with a damaged gradient as new, so it encodes the text again.
                await self._writer.put(stored.document, stored.version)
                is_made = True
            except VersionConflictError:
                continue  # it was written or deleted meanwhile
            except BankError as error:
                logger.error("gradient %s can't be made again from document %r: %s", digest, stored.document.id, error)
        is_made |= await self._repair_past(digest)
        left = await in_thread(self._pool, self._owners, digest)
        past = await in_thread(self._pool, self._past_owners, digest)
        if not (left or past or is_made):  # its last document went before the repair, or as it began
            return Mended.GONE
        if not (left or past) or await self._is_sound(digest):
            self._metrics.repaired()
            logger.warning("gradient %s was damaged; made again from the text of its document", digest)
            return Mended.MADE
        owner = (left or past)[0]
        logger.error(
            "gradient %s is lost; upload it again for document %r in namespace %r%s",
            digest,
            owner.document.id,
            owner.document.namespace,
            "" if left else f", of which version {owner.version} had it, or purge that document",
        )
        return Mended.LOST

    async def _repair_past(self, digest: str) -> bool:
        """Repairs the past versions with this gradient. True if one of them got a sound record."""
        is_made = False
        for stored in await in_thread(self._pool, self._past_owners, digest):
            if stored.gradient.num_tokens == UPLOADED or await self._is_sound(digest):
                continue
            try:
                is_made |= await self._remake(stored)
            except BankError as error:
                logger.error(
                    "gradient %s can't be made again from version %d of document %r: %s",
                    digest,
                    stored.version,
                    stored.document.id,
                    error,
                )
        return is_made

    async def _remake(self, stored: StoredDocument) -> bool:
        """Encodes a past version's text again and stores the gradient. False if the version is gone."""
        encoded = await asyncio.wrap_future(self._encodes.submit(stored.document.title, stored.document.text))
        record = encoded.record
        made = Gradient(
            record_digest(record), len(record), encoded.num_tokens, encoded.truncated, stored.gradient.embedding
        )

        def write() -> bool:
            with self._stores.blobs.hold(made.digest):
                try:
                    self._stores.blobs.put(made.digest, record)
                except OSError as error:
                    raise UnavailableError(f"the blob store must be writable, got {error}") from error
                return self._stores.catalog.replace_past_gradient(
                    stored.sequence, stored.gradient.digest, made
                ).result()

        is_made = await in_thread(self._pool, write)
        # Remove the damaged record. If the version was purged or expired meanwhile, remove the new one too.
        await self._discarder.discard({stored.gradient.digest, made.digest})
        return is_made

    async def _is_sound(self, digest: str) -> bool:
        return await in_thread(self._pool, self._stores.blobs.is_sound, digest)

    def _owners(self, digest: str) -> list[StoredDocument]:
        with self._stores.catalog.view() as view:
            return view.owners(digest, MAX_OWNERS)

    def _past_owners(self, digest: str) -> list[StoredDocument]:
        with self._stores.catalog.view() as view:
            return view.past_owners(digest, MAX_OWNERS)
