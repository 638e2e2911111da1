"""The health of a bank, for clients that choose among several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

FOLLOW_SECONDS = 1.0  # between two looks at the bank
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

    async def follow(self, services: Sequence[str], is_serving: Callable[[], bool]) -> None:
        """Tells the health of the bank, until it is cancelled or ``leave`` is called."""
        states = health_pb2.HealthCheckResponse
        while True:
            for service in services:
                await self.set(service, states.SERVING if is_serving() else states.NOT_SERVING)
            await asyncio.sleep(FOLLOW_SECONDS)

    async def leave(self) -> None:
        """NOT_SERVING from now on. Returns when no client that watches sends more calls."""
        await self.enter_graceful_shutdown()
        if self._watches:
            await asyncio.sleep(LEAVE_SECONDS)
            for watch in self._watches:
                watch.cancel()
