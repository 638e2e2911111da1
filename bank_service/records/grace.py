"""The grace period: the time between a gradient's last document and its removal from an object store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, Protocol, TypeAlias

from bank_service.catalog.nodes import Nodes
from bank_service.errors import UnavailableError
from bank_service.runtime.threads import in_thread

Waits: TypeAlias = Mapping[str, Any]  # digest → its wait, which differs from each later one of the same digest


class Grace(Protocol):
    """Digests that wait for their removal. Used in one event loop."""

    @property
    def is_needed(self) -> bool:
        """False: gradients are removed without a wait."""
        ...

    async def add(self, digests: Iterable[str]) -> None:
        """These wait from now on."""
        ...

    async def all(self) -> Waits:
        """All digests. UnavailableError."""
        ...

    async def due(self) -> Waits:
        """Digests whose wait is over. UnavailableError."""
        ...

    async def forget(self, waits: Waits) -> None:
        """These waits are over. A digest that waits anew meanwhile goes on waiting. UnavailableError."""
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

    async def all(self) -> Waits:
        return dict(self._until)

    async def due(self) -> Waits:
        now = time.monotonic()
        found = {}
        for digest, until in self._until.items():
            if until > now:
                break
            found[digest] = until
        return found

    async def forget(self, waits: Waits) -> None:
        for digest, until in waits.items():
            if self._until.get(digest) == until:
                del self._until[digest]


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

    async def all(self) -> Waits:
        await self.add(())
        return await in_thread(self._pool, self._nodes.dropped, 0.0)

    async def due(self) -> Waits:
        await self.add(())
        return await in_thread(self._pool, self._nodes.dropped, self._seconds)

    async def forget(self, waits: Waits) -> None:
        await in_thread(self._pool, self._nodes.forget_dropped, waits)
