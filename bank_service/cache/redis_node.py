"""One Redis server, which may fail or be slow at any time.

After a failure or a slow answer, it is asked nothing for COOL_DOWN_SECONDS. Otherwise every call would wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from bank_service.cache.record_cache import CacheCounts
from bank_service.runtime.seldom import Seldom

logger = logging.getLogger(__name__)

COOL_DOWN_SECONDS = 1.0
MAX_CONNECTIONS = 8

Command = Sequence[str | bytes | int]


class RedisNode:
    """Connections to one server."""

    def __init__(self, settings: Mapping[str, Any], timeout: float, counts: CacheCounts, failures: Seldom) -> None:
        """``settings``: of the connections, as redis-py has them. ``timeout``: of each call, in seconds. ``counts``
        gets the failures, and ``failures`` says whether one is due for the log. TypeError for an unknown setting."""
        self._connections = BlockingConnectionPool(
            **settings,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )
        # It connects later, but checks the settings now.
        self._connections.make_connection()  # type: ignore[no-untyped-call]
        self._redis = Redis(connection_pool=self._connections)
        self._timeout = timeout
        self._counts = counts
        self._failures = failures
        self._rest_until = 0.0

    @property
    def rests(self) -> bool:
        """It failed a moment ago, so ``ask`` asks nothing."""
        return time.monotonic() < self._rest_until

    async def ask(self, commands: Sequence[Command]) -> list[object] | None:
        """The answer of each command, a RedisError for one that the server refuses. None if the server fails, is slow
        or rests."""
        if self.rests:
            return None
        try:
            async with asyncio.timeout(self._timeout), self._redis.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError) as error:
            self._counts.errors += 1
            self._rest_until = time.monotonic() + COOL_DOWN_SECONDS
            if self._failures.is_due():
                logger.warning("the gradient cache failed (%s: %s); using the blobs", type(error).__name__, error)
            return None

    async def answers(self) -> bool:
        """Whether the server answers now. It is asked while it rests, too."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._redis.ping()
        except (RedisError, OSError, TimeoutError):
            return False
        return True

    async def close(self) -> None:
        await self._redis.aclose()
        await self._connections.aclose()
