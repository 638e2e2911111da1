"""Says what Redis servers lack for a cache of gradients. A bank starts without them, and reads the blobs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from redis.exceptions import RedisError

from bank_service.cache.record_cache import CacheCounts
from bank_service.cache.redis_cache import KEY_PREFIX
from bank_service.cache.redis_node import RedisNode
from bank_service.cache.redis_servers import RedisServers
from bank_service.values.engine_state import EngineState, Lack

ENGINE = "Redis"
TIMEOUT_SECONDS = 2.0
NUM_KEYS = 512  # tried, so that each server of a cluster has one
_NO_CACHE = "every gradient is read from the blobs"


async def redis_state(url: str) -> EngineState:
    """Asks every server that has keys. Its own key is removed at the end, and expires in seconds anyway."""
    servers = RedisServers(url, TIMEOUT_SECONDS, CacheCounts())
    try:
        keys = [f"{KEY_PREFIX}check-{secrets.token_hex(8)}" for _ in range(NUM_KEYS)]
        found = {node: keys[0] for node, keys in (await servers.route(keys)).items()}
        told = [await _ask(node, key) for node, key in found.items()]
    finally:
        await servers.close()
    lacks = list(dict.fromkeys(lack for _, each in told for lack in each))  # the same of several servers once
    versions = sorted({version for version, _ in told if version})
    silent = sum(not version for version, _ in told)
    if not versions:
        return EngineState(ENGINE, False, lacks=(_silent("an answer"),))
    if silent:
        lacks.insert(0, _silent(f"an answer of {silent} of {len(told)} servers"))
    of_how_many = f", {len(told)} servers" if len(told) > 1 else ""
    return EngineState(ENGINE, True, ", ".join(versions) + of_how_many, tuple(lacks))


def _silent(missing: str) -> Lack:
    return Lack(missing, _NO_CACHE, "start it, or mend address, password or TLS in --redis-url")


async def _ask(node: RedisNode, key: str) -> tuple[str, list[Lack]]:
    """A server's version, and what it lacks. An empty version: it doesn't answer."""
    commands = (("INFO",), ("SET", key, b"x", "EX", 10), ("GET", key), ("UNLINK", key))
    answers = await node.ask(commands)
    if answers is None:
        return "", []
    refused = [str(command[0]) for command, answer in zip(commands, answers, strict=True) if _is_error(answer)]
    lacks = []
    if set(refused) & {"SET", "GET", "UNLINK"}:
        what = f"the commands {', '.join(refused)}"
        lacks.append(Lack(what, _NO_CACHE, "allow them for this user on the keys regrad:gradient:*"))
    elif refused:
        lacks.append(Lack("the command INFO", "nobody sees whether its memory is limited", "allow it for this user"))
    facts = answers[0] if isinstance(answers[0], dict) else {}
    version = str(facts.get("valkey_version") or facts.get("redis_version") or "unknown")
    return version, [*lacks, *_memory_lacks(facts)]


def _is_error(answer: object) -> bool:
    return isinstance(answer, RedisError)


def _memory_lacks(facts: dict[str, object]) -> Iterator[Lack]:
    if facts.get("maxmemory") == 0:
        cost = "it keeps all gradients that a day's reads need"
        yield Lack("maxmemory", cost, "set maxmemory, and maxmemory-policy allkeys-lru")
    elif facts.get("maxmemory_policy") == "noeviction":
        yield Lack("an eviction policy", "once full it takes no gradient", "set maxmemory-policy allkeys-lru")
