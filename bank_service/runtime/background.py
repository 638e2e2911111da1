"""Background work. A call starts it and does not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from bank_service.errors import BankError

logger = logging.getLogger(__name__)
T = TypeVar("T")
CANCEL_SECONDS = 1.0  # between two attempts to end a task


class Background:
    """Tasks that may run longer than the calls that started them. The bank waits for them when it stops."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts ``work``. Its errors are logged, except for a BankError, which the caller reports."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def drain(self) -> None:
        """Returns when all tasks are done. Tasks that start meanwhile count too."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))
            await asyncio.sleep(0)  # lets the callbacks run

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, BankError):
            logger.error("background work failed", exc_info=error)


async def cancelled(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task and returns when it has ended. None stands for a task that never began."""
    if task is not None:
        while not task.done():
            # Cancel repeatedly: before Python 3.12, asyncio.wait_for (in redis-py) may swallow a cancellation.
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_SECONDS)
        await asyncio.gather(task, return_exceptions=True)


async def finished(task: asyncio.Task[T]) -> T:
    """The task's result. A cancelled caller does not stop the task, and ends only after it."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):  # the caller may be cancelled again
                await asyncio.wait([task])
        raise
