"""Work that a call starts and does not wait for; and locks by key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bank_service.errors import BankError

logger = logging.getLogger(__name__)
T = TypeVar("T")
CANCEL_SECONDS = 1.0  # between two attempts to end a task


class Background:
    """Tasks that outlive the call that started them, and are waited for when the bank stops."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts ``work``. What goes wrong is logged, but for the bank's own errors, which its caller answers with."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def drain(self) -> None:
        """Returns when all is done, also what was started meanwhile."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))
            await asyncio.sleep(0)  # lets the callbacks run

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, BankError):
            logger.error("background work failed", exc_info=error)


async def cancelled(task: asyncio.Task[Any] | None) -> None:
    """Ends a task, and returns when it has ended, however; None is one that never began."""
    if task is not None:
        while not task.done():
            # Again where it got lost: before Python 3.12, asyncio.wait_for (in redis-py) may swallow it.
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_SECONDS)
        await asyncio.gather(task, return_exceptions=True)


async def finished(task: asyncio.Task[T]) -> T:
    """The task's result. Where the caller is cancelled the task goes on, and the caller ends when it has."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class KeyedLocks:
    """One lock per key, first come first served; nothing is kept of keys that nobody uses."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncIterator[None]:
        entry = self._entries.setdefault(key, _Entry())
        entry.num_users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.num_users -= 1
            if not entry.num_users:
                del self._entries[key]
