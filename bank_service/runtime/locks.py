"""Locks by key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _KeyedLock:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class KeyedLocks:
    """One lock per key, first come first served. Nothing is kept of keys that nobody uses."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, _KeyedLock] = {}

    @asynccontextmanager
    async def lock(self, key: Hashable) -> AsyncIterator[None]:
        """Nobody else is inside with the same key."""
        own = self._locks.setdefault(key, _KeyedLock())
        own.num_users += 1
        try:
            async with own.lock:
                yield
        finally:
            own.num_users -= 1
            if not own.num_users:
                del self._locks[key]
