"""A cache of recently read gradient records in Redis. If the cache fails, a fetch reads the blobs.

Every record expires, so a server without a memory limit does not grow for ever. Each record is fetched by a command of
its own, so a server that fails costs only the records that it has. The bank repeats failed removals when the server
answers again, except those of expired records.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
    RedisError,
)

from bank_service.cache.record_cache import CacheCounts
from bank_service.cache.redis_node import Command, RedisNode
from bank_service.cache.redis_servers import RedisServers
from bank_service.runtime.threads import in_thread
from bank_service.wire.record import record_digest

logger = logging.getLogger(__name__)

KEY_PREFIX = "regrad:gradient:"
MAX_KEYS = 1000  # removed in one call
_ELSEWHERE = (AskError, ClusterDownError, MasterDownError, MovedError, ReadOnlyError)  # the key has another server now


@dataclass(slots=True)
class _Answers:
    """The answers to a command for each of several digests."""

    done: dict[str, object] = field(default_factory=dict)  # digest → the answer
    failed: set[str] = field(default_factory=set)  # sent, but perhaps not done


class RedisCache:
    """Implements ``RecordCache`` with servers that speak Redis' protocol."""

    def __init__(self, url: str, timeout_ms: int, ttl_seconds: int, pool: Executor) -> None:
        """A record expires ``ttl_seconds`` after its last write. ValueError for a URL that redis-py doesn't take."""
        self.counts = CacheCounts()
        self._servers = RedisServers(url, timeout_ms / 1000, self.counts)
        self._ttl_seconds = ttl_seconds
        self._pool = pool
        self._unremoved: dict[str, float] = {}  # digests to remove → their expiry, on the monotonic clock

    async def close(self) -> None:
        await self.retry()
        await self._servers.close()

    async def is_available(self) -> bool:
        nodes = await self._servers.all()
        return bool(nodes) and all(await asyncio.gather(*(node.answers() for node in nodes)))

    async def get(self, digests: Sequence[str]) -> dict[str, bytes]:
        if not digests:
            return {}
        answers = await self._each({digest: ("GET", KEY_PREFIX + digest) for digest in digests})
        found = {digest: value for digest, value in answers.done.items() if isinstance(value, bytes)}
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
        commands = {
            digest: ("SET", KEY_PREFIX + digest, record, "EX", self._ttl_seconds) for digest, record in records.items()
        }
        answers = await self._each(commands)
        expired = time.monotonic() + self._ttl_seconds
        # A server that failed may still store them.
        sent = answers.done.keys() | answers.failed
        self._unremoved.update(
            {digest: expired for digest in sent if digest in answers.failed or digest in self._unremoved}
        )

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
        """Logs a warning if a server has no memory limit. Then only the expiry keeps it from growing."""
        for node in await self._servers.all():
            memory = await node.ask([("INFO", "memory")])
            if memory and isinstance(memory[0], dict) and memory[0].get("maxmemory") == 0:
                logger.warning(
                    "the Redis server should have a memory limit, got maxmemory 0: it grows by every gradient written "
                    "in %d s; set maxmemory, and maxmemory-policy allkeys-lru",
                    self._ttl_seconds,
                )
                return

    async def _unlink(self, digests: Sequence[str]) -> None:
        for start in range(0, len(digests), MAX_KEYS):
            part = digests[start : start + MAX_KEYS]
            answers = await self._each({digest: ("UNLINK", KEY_PREFIX + digest) for digest in part})
            for digest in answers.done:
                self._unremoved.pop(digest, None)

    async def _each(self, commands: Mapping[str, Command]) -> _Answers:
        """Sends each digest's command to the server of its key, to all servers at once."""
        routes = await self._servers.route(KEY_PREFIX + digest for digest in commands)
        answers = _Answers()

        async def ask(node: RedisNode, digests: list[str]) -> None:
            if node.rests:
                return
            replies = await node.ask([commands[digest] for digest in digests])
            if replies is None:
                self._servers.look_again()
                answers.failed.update(digests)
                return
            for digest, reply in zip(digests, replies, strict=True):
                if isinstance(reply, RedisError):
                    answers.failed.add(digest)
                    self.counts.errors += 1
                    if isinstance(reply, _ELSEWHERE):
                        self._servers.look_again()
                else:
                    answers.done[digest] = reply

        await asyncio.gather(
            *(ask(node, [key.removeprefix(KEY_PREFIX) for key in keys]) for node, keys in routes.items())
        )
        return answers


def _mismatches(records: Mapping[str, bytes]) -> list[str]:
    return [digest for digest, record in records.items() if record_digest(record) != digest]
