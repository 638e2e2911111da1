"""The health of a bank, for clients that choose among several."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1.health import aio

LEAVE_SECONDS = 1.0  # for clients that watch: until they no longer send calls to a bank that stops


class Health(aio.HealthServicer):  # type: ignore[misc]
    """The standard health service. ``leave`` tells all clients that watch it, and ends their watches."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[None]] = set()

    async def Watch(self, request: Any, context: Any) -> None:
        watch = asyncio.create_task(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait([watch])
        finally:
            self._watches.discard(watch)
            watch.cancel()

    async def leave(self) -> None:
        """NOT_SERVING from now on. Returns when no client that watches sends more calls."""
        await self.enter_graceful_shutdown()
        if self._watches:
            await asyncio.sleep(LEAVE_SECONDS)
            for watch in self._watches:
                watch.cancel()
