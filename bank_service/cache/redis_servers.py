"""Which Redis server has a key: the only one, the primary that Sentinels know, or the one that has the key's slot.

redis-py's RedisCluster isn't used: it raises an error where all connections of a server are busy, and doesn't wait.
There the failure of one server also ends a call that asks several servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from redis.asyncio.connection import parse_url
from redis.crc import key_slot

from bank_service.cache import redis_node
from bank_service.cache.record_cache import CacheCounts
from bank_service.cache.redis_node import Command, RedisNode
from bank_service.runtime.seldom import Seldom
from bank_service.values.redis_url import RedisKind, RedisUrl, unusable

logger = logging.getLogger(__name__)

Address = tuple[str, int]
_NUM_SLOTS = 16384


class RedisServers:
    """The servers of one URL. It looks for them at the first call, and again after a failure or a move of keys.

    Between two looks at least COOL_DOWN_SECONDS pass. A look asks the servers that it knows until one tells.
    """

    def __init__(self, url: str, timeout: float, counts: CacheCounts) -> None:
        """ValueError for a URL that redis-py doesn't take."""
        self._url = RedisUrl.parse(url, "redis_url")
        self._timeout = timeout
        self._counts = counts
        self._failures = Seldom()
        self._nodes: dict[Address | None, RedisNode] = {}
        self._guides: dict[Address, RedisNode] = {}  # Sentinels
        try:
            self._settings: dict[str, Any] = dict(parse_url(self._url.base))
            first = self._node(None if self._url.kind is RedisKind.ONE else self._url.addresses[0])
        except (ValueError, TypeError):  # without the cause, whose text may have a part of the password
            raise ValueError(unusable("redis_url")) from None
        self._shares: list[tuple[int, int, RedisNode]] = []  # first and last slot, and their server
        if self._url.kind is RedisKind.ONE:
            self._shares = [(0, _NUM_SLOTS - 1, first)]
        self._is_stale = self._url.kind is not RedisKind.ONE
        self._next_look = 0.0
        self._looking = asyncio.Lock()

    async def route(self, keys: Iterable[str]) -> dict[RedisNode, list[str]]:
        """The keys of each server. Keys without a server are left out."""
        if self._is_stale and (not self._shares or not self._looking.locked()):
            async with self._looking:
                if self._is_stale and time.monotonic() >= self._next_look:
                    await self._look()
        routes: dict[RedisNode, list[str]] = {}
        for key in keys:
            slot = key_slot(key.encode()) if self._url.kind is RedisKind.CLUSTER else 0
            node = next((node for first, last, node in self._shares if first <= slot <= last), None)
            if node is not None:
                routes.setdefault(node, []).append(key)
        return routes

    async def all(self) -> list[RedisNode]:
        """All servers with keys; none where they can't be found."""
        await self.route(())
        return list(dict.fromkeys(node for _, _, node in self._shares))

    def look_again(self) -> None:
        """Keys may have moved, or their server may have failed."""
        self._is_stale = self._url.kind is not RedisKind.ONE

    async def close(self) -> None:
        for node in (*self._nodes.values(), *self._guides.values()):
            await node.close()

    async def _look(self) -> None:
        found: list[tuple[int, int, Address]] | None
        if self._url.kind is RedisKind.SENTINEL:
            found = await self._ask_sentinels()
        else:
            found = await self._ask_cluster()
        self._next_look = time.monotonic() + redis_node.COOL_DOWN_SECONDS
        if found is not None:
            self._shares = [(first, last, self._node(address)) for first, last, address in found]
            self._is_stale = False
            await self._forget()
        elif self._failures.is_due():
            logger.warning("no server of redis_url says which server has the cached gradients; using the blobs")

    async def _forget(self) -> None:
        """Closes the servers that have no keys any more and are not in the URL."""
        kept = {node for _, _, node in self._shares}
        for address, node in list(self._nodes.items()):
            if node not in kept and address not in self._url.addresses:
                del self._nodes[address]
                await node.close()

    async def _ask_sentinels(self) -> list[tuple[int, int, Address]] | None:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.service)
        async with aclosing(self._told(command)) as answers:
            async for _, answer in answers:
                if isinstance(answer, list):
                    host, port = answer
                    return [(0, _NUM_SLOTS - 1, (_text(host), int(port)))]
        return None

    async def _ask_cluster(self) -> list[tuple[int, int, Address]] | None:
        async with aclosing(self._told(("CLUSTER", "SLOTS"))) as answers:
            async for asked, answer in answers:
                if isinstance(answer, list) and answer:
                    shares = []
                    for first, last, (host, port, *_), *_ in answer:
                        shares.append((int(first), int(last), (_text(host) or asked[0], int(port))))
                    return shares
        return None

    async def _told(self, command: Command) -> AsyncGenerator[tuple[Address, object], None]:
        """The address and the answer of each server that answers a question about the others."""
        known = [address for address in self._nodes if address is not None]
        is_sentinel = self._url.kind is RedisKind.SENTINEL
        for address in self._url.addresses if is_sentinel else dict.fromkeys((*known, *self._url.addresses)):
            answer = await (self._guide(address) if is_sentinel else self._node(address)).ask([command])
            if answer is not None:
                yield address, answer[0]

    def _node(self, address: Address | None) -> RedisNode:
        """The server at an address; None: the one that the URL names."""
        if address not in self._nodes:
            settings = self._settings if address is None else self._settings | _place(address)
            self._nodes[address] = RedisNode(settings, self._timeout, self._counts, self._failures)
        return self._nodes[address]

    def _guide(self, address: Address) -> RedisNode:
        """The Sentinel at an address. It has a name and a password of its own, or none."""
        if address not in self._guides:
            settings = {name: value for name, value in self._settings.items() if name not in ("username", "password")}
            settings |= _place(address) | dict(self._url.sentinel_options) | {"db": 0}
            self._guides[address] = RedisNode(settings, self._timeout, self._counts, self._failures)
        return self._guides[address]


def _place(address: Address) -> dict[str, Any]:
    host, port = address
    return {"host": host, "port": port}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")
