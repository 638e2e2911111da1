"""The grace period: the time between a gradient's last document and its removal from an object store."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from concurrent.futures import Executor
from typing import Protocol

from bank_service.catalog.nodes import Nodes
from bank_service.errors import UnavailableError
from bank_service.runtime.threads import in_thread


class Grace(Protocol):
    """Digests that wait for their removal. Used in one event loop."""

    @property
    def is_needed(self) -> bool:
        """False: gradients are removed without a wait."""
        ...

    async def add(self, digests: Iterable[str]) -> None:
        """These wait from now on."""
        ...

    async def all(self) -> list[str]:
        """All digests. UnavailableError."""
        ...

    async def due(self) -> list[str]:
        """Digests whose wait is over. UnavailableError."""
        ...

    async def forget(self, digests: Collection[str]) -> None:
        """These wait no more. UnavailableError."""
        ...


class OwnGrace:
    """In memory, for a bank that has its store alone. A digest that is added again waits anew."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[str, float] = {}  # digest → end of its wait on the monotonic clock, the earliest first

    @property
    def is_needed(self) -> bool:
        return self._seconds > 0

    async def add(self, digests: Iterable[str]) -> None:
        until = time.monotonic() + self._seconds
        for digest in digests:
            self._until.pop(digest, None)
            self._until[digest] = until

    async def all(self) -> list[str]:
        return list(self._until)

    async def due(self) -> list[str]:
        now = time.monotonic()
        found = []
        for digest, until in self._until.items():
            if until > now:
                break
            found.append(digest)
        return found

    async def forget(self, digests: Collection[str]) -> None:
        for digest in digests:
            self._until.pop(digest, None)


class SharedGrace:
    """In the catalog, for all nodes. The transaction that takes a gradient from its last version notes it there."""

    is_needed = True

    def __init__(self, nodes: Nodes, seconds: float, pool: Executor) -> None:
        self._nodes = nodes
        self._seconds = seconds
        self._pool = pool
        self._unwritten: set[str] = set()  # the catalog could not be written

    async def add(self, digests: Iterable[str]) -> None:
        self._unwritten.update(digests)
        if wanted := set(self._unwritten):
            try:
                await in_thread(self._pool, self._nodes.drop, wanted)
            except UnavailableError:
                return  # the next call tries again
            self._unwritten -= wanted

    async def all(self) -> list[str]:
        await self.add(())
        return await in_thread(self._pool, self._nodes.dropped, 0.0)

    async def due(self) -> list[str]:
        await self.add(())
        return await in_thread(self._pool, self._nodes.dropped, self._seconds)

    async def forget(self, digests: Collection[str]) -> None:
        await in_thread(self._pool, self._nodes.forget_dropped, digests)
