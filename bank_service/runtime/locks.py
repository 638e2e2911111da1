"""Locks: only one task, or one thread, is inside at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _KeyedLock:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class KeyedLocks:
    """One lock per key, first come first served. An unused lock takes no memory."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, _KeyedLock] = {}

    @asynccontextmanager
    async def lock(self, key: Hashable) -> AsyncIterator[None]:
        """Only one task at a time is inside the block with the same key."""
        own = self._locks.setdefault(key, _KeyedLock())
        own.num_users += 1
        try:
            async with own.lock:
                yield
        finally:
            own.num_users -= 1
            if not own.num_users:
                del self._locks[key]


class FairLock:
    """A lock of threads, in order of arrival: ``with lock:``.

    With a plain lock, a thread that takes it again at once gets it before the threads that wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = threading.Lock()  # held by the one thread that waits for ``_lock``

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
