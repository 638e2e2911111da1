"""A cache of recently read gradient records in Redis. If the cache fails, a fetch reads the blobs.

Every record expires, so a server without a memory limit does not grow for ever. After a failure or a slow answer, the
bank asks the server nothing for COOL_DOWN_SECONDS. Otherwise every call would wait for it. The bank repeats failed
removals when the server answers again, except those of expired records.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from bank_service.cache.record_cache import CacheCounts
from bank_service.runtime.seldom import Seldom
from bank_service.runtime.threads import in_thread
from bank_service.values.redis_url import unusable
from bank_service.wire.record import record_digest

logger = logging.getLogger(__name__)

COOL_DOWN_SECONDS = 1.0
MAX_CONNECTIONS = 8
KEY_PREFIX = "regrad:gradient:"
MAX_KEYS = 1000  # in one UNLINK


class RedisCache:
    """Implements ``RecordCache`` with a server that speaks Redis' protocol."""

    def __init__(self, url: str, timeout_ms: int, ttl_seconds: int, pool: Executor) -> None:
        """A record expires ``ttl_seconds`` after its last write. ValueError for a URL that redis-py doesn't take."""
        timeout = timeout_ms / 1000
        try:
            self._connections = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=timeout,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0),
            )
            # It connects later, but checks the URL's options now.
            self._connections.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError):  # without the cause, whose text may have a part of the password
            raise ValueError(unusable("redis_url")) from None
        self._redis = Redis(connection_pool=self._connections)
        self._timeout = timeout
        self._ttl_seconds = ttl_seconds
        self._pool = pool
        self._rest_until = 0.0
        self._failures = Seldom()
        self._unremoved: dict[str, float] = {}  # digests to remove → their expiry, on the monotonic clock
        self.counts = CacheCounts()

    async def close(self) -> None:
        await self.retry()
        await self._redis.aclose()
        await self._connections.aclose()

    async def is_available(self) -> bool:
        try:
            async with asyncio.timeout(self._timeout):
                await self._redis.ping()
        except (RedisError, OSError, TimeoutError):
            return False
        return True

    async def get(self, digests: Sequence[str]) -> dict[str, bytes]:
        if not digests:
            return {}
        values = await self._call("MGET", *[KEY_PREFIX + digest for digest in digests])
        found: dict[str, bytes] = {}
        if isinstance(values, list):
            found = {digest: value for digest, value in zip(digests, values, strict=True) if isinstance(value, bytes)}
        bad = await in_thread(self._pool, _mismatches, found)
        if bad:
            self.counts.corrupt += len(bad)
            logger.warning("%d cached gradients did not match their digests; using the blobs", len(bad))
            found = {digest: record for digest, record in found.items() if digest not in bad}
            await self.remove(bad)
        self.counts.hits += len(found)
        self.counts.misses += len(digests) - len(found)
        return found

    async def put(self, records: Mapping[str, bytes]) -> None:
        if records and not self._rests():
            pipeline = self._redis.pipeline(transaction=False)
            for digest, record in records.items():
                pipeline.set(KEY_PREFIX + digest, record, ex=self._ttl_seconds)
            failed = await self._guarded(pipeline.execute) is None  # the server may still store them
            expired = time.monotonic() + self._ttl_seconds
            self._unremoved.update({digest: expired for digest in records if failed or digest in self._unremoved})

    async def remove(self, digests: Sequence[str]) -> None:
        for digest in digests:
            self._unremoved.setdefault(digest, time.monotonic() + self._ttl_seconds)
        await self._unlink(digests)

    async def retry(self) -> None:
        now = time.monotonic()
        self._unremoved = {digest: expired for digest, expired in self._unremoved.items() if expired > now}
        await self._unlink(list(self._unremoved))

    def may_have(self, digests: Iterable[str]) -> bool:
        return any(digest in self._unremoved for digest in digests)

    async def warn_where_unlimited(self) -> None:
        """Logs a warning if the server has no memory limit. Then only the expiry keeps it from growing."""
        memory = await self._call("INFO", "memory")
        if isinstance(memory, dict) and memory.get("maxmemory") == 0:
            logger.warning(
                "the Redis server should have a memory limit, got maxmemory 0: it grows by every gradient written in "
                "%d s; set maxmemory, and maxmemory-policy allkeys-lru",
                self._ttl_seconds,
            )

    async def _unlink(self, digests: Sequence[str]) -> None:
        for start in range(0, len(digests), MAX_KEYS):
            part = digests[start : start + MAX_KEYS]
            if await self._call("UNLINK", *[KEY_PREFIX + digest for digest in part]) is None:
                return
            for digest in part:
                self._unremoved.pop(digest, None)

    def _rests(self) -> bool:
        return time.monotonic() < self._rest_until

    async def _call(self, command: str, *arguments: str) -> object:
        """The server's answer, or None; see ``_guarded``."""
        return await self._guarded(lambda: self._redis.execute_command(command, *arguments))  # type: ignore[no-untyped-call]

    async def _guarded(self, ask: Callable[[], Awaitable[object]]) -> object:
        """The result of ``ask``. None if the server fails, is slow, or is left alone after a failure."""
        if self._rests():
            return None
        try:
            async with asyncio.timeout(self._timeout):
                return await ask()
        except (RedisError, OSError, TimeoutError) as error:
            self.counts.errors += 1
            self._rest_until = time.monotonic() + COOL_DOWN_SECONDS
            if self._failures.is_due():
                logger.warning("the gradient cache failed (%s: %s); using the blobs", type(error).__name__, error)
            return None


def _mismatches(records: Mapping[str, bytes]) -> list[str]:
    return [digest for digest, record in records.items() if record_digest(record) != digest]
