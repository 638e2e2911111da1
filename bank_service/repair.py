"""A gradient that is lost or damaged on disk, made again from the text of its document.

Only what the bank's own encoder made can be made again: a gradient that was uploaded is its uploader's business.
Where the encoder gives the same record again, the document stays as it is; where it gives another, the document gets
that one as a new version, in one commit. A document never has a gradient that its text did not give.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from bank_service.background import Background
from bank_service.documents import StoredDocument
from bank_service.errors import BankError, UnavailableError, VersionConflictError
from bank_service.metrics import BankMetrics
from bank_service.stores import Stores
from bank_service.threads import in_thread
from bank_service.writer import UPLOADED, Writer

logger = logging.getLogger(__name__)

WAIT_SECONDS = 10.0  # of a reader for a repair; it goes on without the reader
MAX_OWNERS = 64  # documents of one gradient that are written anew; one of them is enough where the record is the same


class Repairer:
    """Repairs gradients, each once however many find it damaged."""

    def __init__(
        self, stores: Stores, writer: Writer, background: Background, pool: Executor, metrics: BankMetrics
    ) -> None:
        self._stores = stores
        self._writer = writer
        self._background = background
        self._pool = pool
        self._metrics = metrics
        self._running: dict[str, asyncio.Task[bool]] = {}

    async def repair_for_reader(self, digest: str) -> bool:
        """Like ``repair``; UnavailableError where it takes longer than WAIT_SECONDS, and goes on."""
        try:
            return await asyncio.wait_for(self.repair(digest), WAIT_SECONDS)
        except TimeoutError:
            raise UnavailableError(
                f"gradient {digest} was damaged and is being made again from its document's text; try again later"
            ) from None

    async def repair(self, digest: str) -> bool:
        """The record is there and sound again, or no document names it any more. False where that can't be."""
        task = self._running.get(digest)
        if task is None:
            task = self._background.run(self._repair(digest))
            self._running[digest] = task
            task.add_done_callback(lambda _: self._running.pop(digest, None))
        return await asyncio.shield(task)

    async def _repair(self, digest: str) -> bool:
        owners = await in_thread(self._pool, self._owners, digest)
        for stored in owners:
            if stored.gradient.num_tokens == UPLOADED:
                continue
            try:
                # A document whose gradient is not sound is taken as new; see Writer.
                await self._writer.put(stored.document, stored.version)
            except VersionConflictError:
                continue  # somebody wrote or deleted it meanwhile
            except BankError as error:
                logger.error("gradient %s can't be made again from document %r: %s", digest, stored.document.id, error)
        left = await in_thread(self._pool, self._owners, digest)
        if not left or await in_thread(self._pool, self._stores.blobs.is_sound, digest):
            self._metrics.repaired()
            logger.warning("gradient %s was damaged; made again from the text of its document", digest)
            return True
        logger.error(
            "gradient %s is lost; upload it again for document %r in namespace %r",
            digest,
            left[0].document.id,
            left[0].document.namespace,
        )
        return False

    def _owners(self, digest: str) -> list[StoredDocument]:
        with self._stores.catalog.view() as view:
            return view.owners(digest, MAX_OWNERS)
