"""Gives a collection another codec, while the bank serves.

One commit changes the collection's codec, which holds for all later writes. Then every stored gradient is decoded and
encoded again, document by document. Each becomes a new version in one commit, so a reader gets the whole old record or
the whole new one. The catalog records that the work is not done. So a bank that stops meanwhile continues when it opens
again.

More components do not restore what fewer have lost. For that, ingest the documents again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from bank_service.errors import BankError, DataLossError, InvalidArgumentError, UnavailableError
from bank_service.records.stores import Stores
from bank_service.records.writer import Writer
from bank_service.runtime.background import cancelled
from bank_service.runtime.threads import in_thread
from bank_service.values.documents import StoredDocument
from bank_service.wire.codecs.factors import is_factors
from bank_service.wire.record import DEFAULT_CODEC, GradientFormatError, check_choice

logger = logging.getLogger(__name__)

PAGE = 64  # documents read from the catalog at a time
_LOOK_SECONDS = 0.5  # between two reports of progress


@dataclass(frozen=True, slots=True)
class RecodeProgress:
    """The state of the work."""

    codec: str
    num_documents: int = 0  # documents of the collection when the work began
    num_done: int = 0  # documents visited
    num_recoded: int = 0  # visited documents that had another codec
    num_failed: int = 0  # documents that keep their old record: it is damaged, or the quota is full
    finished: bool = False


def codec_to_write(codec: str) -> str:
    """The codec of later writes in a collection that has ``codec``. A retired one is not written any more.

    Its gradients keep it, because a recoding loses bits. The operator has to want it, so the log says how.
    """
    if is_factors(codec):
        return codec
    logger.warning(
        "the collection's codec must be of factors, got %s, which is retired; its gradients are still read, and new "
        "ones are stored as %s; `regrad recode %s` gives the old ones factors, too",
        codec,
        DEFAULT_CODEC,
        DEFAULT_CODEC,
    )
    return DEFAULT_CODEC


class Recoder:
    """Recodes one collection. Used in the bank's event loop."""

    def __init__(self, stores: Stores, writer: Writer, pool: Executor) -> None:
        self._stores = stores
        self._writer = writer
        self._pool = pool
        self._task: asyncio.Task[None] | None = None
        self._beginning = asyncio.Lock()  # only one of several callers may begin
        self._progress = RecodeProgress(writer.codec)

    def resume(self) -> None:
        """Continues the work that an earlier process left."""
        with self._stores.catalog.view() as view:
            unfinished = view.is_recoding()
        if unfinished:
            self._start()

    async def stop(self) -> None:
        """Stops the work. It continues when the bank opens again."""
        await cancelled(self._task)

    async def run(self, codec: str) -> AsyncGenerator[RecodeProgress, None]:
        """Begins the work, or joins the work under way, and reports its progress until the end.

        The work continues if the caller stops listening. InvalidArgumentError for an unknown codec. UnavailableError
        while the collection is being recoded to another codec, or on its way to another learner.
        """
        try:
            check_choice(codec[:80])
        except GradientFormatError as error:
            raise InvalidArgumentError(str(error), field="codec") from error
        async with self._beginning:
            if self._task is None or self._task.done():
                await in_thread(self._pool, lambda: self._stores.catalog.begin_recoding(codec).result())
                await self._writer.change_codec(codec)
                self._start()
            elif codec != self._writer.codec:
                raise UnavailableError(
                    f"the collection is on its way to {self._writer.codec}; try again when it is there"
                )
            task = self._task
        assert task is not None
        while not task.done():
            yield self._progress
            await asyncio.wait([task], timeout=_LOOK_SECONDS)
        task.result()
        yield self._progress

    def _start(self) -> None:
        self._progress = RecodeProgress(self._writer.codec)
        self._task = asyncio.create_task(self._recode(), name="bank-recoder")

    async def _recode(self) -> None:
        total = await in_thread(self._pool, self._count)
        self._progress = replace(self._progress, num_documents=total)
        after = 0
        while page := await in_thread(self._pool, self._page, after):
            for stored in page:
                await self._one(stored)
            after = page[-1].key
        await in_thread(self._pool, lambda: self._stores.catalog.end_recoding().result())
        self._progress = replace(self._progress, finished=True)
        logger.info("the collection is recoded: %s", self._progress)

    async def _one(self, stored: StoredDocument) -> None:
        recoded = failed = False
        try:
            recoded = await self._writer.recode(stored.document.namespace, stored.document.id)
        except DataLossError as error:  # the next read repairs the gradient, in the new codec
            failed = True
            logger.error("document %r keeps its gradient: %s", stored.document.id, error)
        except BankError as error:
            failed = True
            logger.error("document %r keeps its gradient's codec: %s", stored.document.id, error)
        done = self._progress
        self._progress = replace(
            done,
            num_done=done.num_done + 1,
            num_recoded=done.num_recoded + recoded,
            num_failed=done.num_failed + failed,
        )

    def _count(self) -> int:
        with self._stores.catalog.view() as view:
            return sum(view.totals().num_documents.values())

    def _page(self, after: int) -> list[StoredDocument]:
        with self._stores.catalog.view() as view:
            return view.after_key(after, PAGE)
