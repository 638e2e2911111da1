"""A model of N servers and M bank nodes under the load benchmark's trace. ``scale_simulation.py`` runs it.

It measures nothing. The times in ``ServiceTimes`` were measured, and each names its source.

- Requests arrive by a Poisson process. A request's first document is drawn by Zipf's law over all documents. The others
  are drawn by the same law from the first one's namespace, and count once where they are drawn twice.
- A router chooses the server: in turns, by the first document, or by the namespace, both by consistent hashing.
- The server asks a bank node, which embeds the question and asks PostgreSQL. Gradients that its arena lacks come from a
  node: from Redis, else from the object store. Then the worker's pool gets them. The request is resident now.
- It then waits for a place in vLLM's batch and leaves after its answer.

Caches are filled before, by references without time. Every cache drops the least recently used document.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import simpy

from benchmarks.popularity import Popularity

Router = Literal["round robin", "by document", "by namespace"]
ROUTERS: tuple[Router, ...] = ("round robin", "by document", "by namespace")
LEVELS = ("pool", "arena", "redis", "store")
RING_POINTS = 160  # of each server, as in nginx
Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTimes:
    """Milliseconds, each of one core or connection. docs/benchmarks.md has their sections."""

    embed: float = 10.8  # of the question, in the node: "The bank"
    node: float = 12.2  # of a query in the node, two cores over 164 queries/s: "The bank"
    sql: float = 4.7  # of a query in PostgreSQL, SQL alone: "The catalog in PostgreSQL"
    node_gradient: float = 1.3  # of 271 kB through the node, at 209 MB/s: "The bank"
    redis_gradient: float = 0.23  # of 271 kB in Redis, at 1,158 MB/s: "The bank"
    store_gradient: float = 1.7  # of an object of 271 kB, from SeaweedFS on the same machine: docs/sizing.md
    resident: float = 1.2  # of a request's way into the worker: "The engine's loop"
    resident_document: float = 0.3  # of each document that the pool lacks: "The engine's loop"
    answer: float = 234.0  # in the batch, 64 requests at 274/s: "On a GPU", the version before


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """The machines and their sizes, in documents where they are caches."""

    servers: int = 8  # vLLM servers
    slots: int = 64  # requests in the batch of each
    permits: int = 8  # requests of each server that ask the bank at a time (--regrad-bank-concurrency)
    pool: int = 2_000  # documents in the worker of each
    arena: int = 8_000  # documents in the arena of each; 8,000 are 2.2 GB
    nodes: int = 4  # bank nodes
    node_cores: int = 8  # of each node
    postgres_cores: int = 8  # cores of PostgreSQL
    redis_servers: int = 2  # each works on one command at a time
    redis: int = 40_000  # documents in all of Redis together
    documents: int = 100_000  # in the bank
    namespaces: int = 1_000  # of about equal size
    top_k: int = 3  # documents of a request


@dataclass(frozen=True, slots=True)
class DrawnTrace:
    """Requests in order: their namespaces, and the different documents of each."""

    namespaces: list[int]
    documents: list[tuple[int, ...]]

    @classmethod
    def draw(cls, machines: Machines, num_requests: int, seed: int) -> DrawnTrace:
        generator = np.random.default_rng([seed, 1])
        number = machines.documents
        weights = np.arange(1, number + 1) ** -Popularity.zipf(number).exponent
        namespace_of = np.random.default_rng([seed, 0]).integers(0, machines.namespaces, number)
        order = np.argsort(namespace_of, kind="stable")  # documents of a namespace follow each other
        ends = np.concatenate([[0.0], np.cumsum(weights[order])])
        starts = np.searchsorted(namespace_of[order], np.arange(machines.namespaces + 1))
        first = np.searchsorted(np.cumsum(weights), generator.random(num_requests) * weights.sum())
        own = namespace_of[first]
        low, high = ends[starts[own]], ends[starts[own + 1]]
        drawn = low[:, None] + generator.random((num_requests, machines.top_k - 1)) * (high - low)[:, None]
        others = order[np.minimum(np.searchsorted(ends, drawn, side="right") - 1, number - 1)]
        rows = np.column_stack([first, others]).tolist()
        return cls(own.tolist(), [tuple(dict.fromkeys(row)) for row in rows])


class Lru:
    """The ``size`` documents that were used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[int, None] = OrderedDict()

    def take(self, document: int) -> bool:
        """Whether the document is there. Then it is the latest."""
        if document not in self._kept:
            return False
        self._kept.move_to_end(document)
        return True

    def put(self, document: int) -> None:
        self._kept[document] = None
        self._kept.move_to_end(document)
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)


class Ring:
    """Consistent hashing: a key belongs to the server of the next point."""

    def __init__(self, servers: int) -> None:
        points = sorted(
            (_hash(f"{server}/{point}"), server) for server in range(servers) for point in range(RING_POINTS)
        )
        self._places = [place for place, _ in points]
        self._servers = [server for _, server in points]

    def server_of(self, key: int) -> int:
        return self._servers[bisect.bisect(self._places, _hash(str(key))) % len(self._servers)]


@dataclass(slots=True)
class SimulatedServer:
    """One vLLM server: its caches, its permits to ask the bank, its batch."""

    pool: Lru
    arena: Lru
    permits: Any  # simpy.Resource
    slots: Any


@dataclass(slots=True)
class RunFigures:
    """The counts and times of one run. Times are in milliseconds."""

    num_started: int = 0
    num_answered: int = 0
    resident_ms: list[float] = field(default_factory=list)  # from arrival until the documents are in the worker
    levels: Counter[str] = field(default_factory=Counter)  # references found at each level
    busy_ms: defaultdict[tuple[str, int], float] = field(
        default_factory=lambda: defaultdict(float)
    )  # of each resource, over all its places
    places: dict[tuple[str, int], int] = field(default_factory=dict)  # of each resource: its kind and number
    last_arrival_ms: float = 0.0

    def utilisation(self) -> dict[str, float]:
        """The busy share of the time until the last arrival, for the busiest resource of each kind."""
        shares: dict[str, float] = {}
        for (kind, number), places in self.places.items():
            share = self.busy_ms[kind, number] / places / self.last_arrival_ms
            shares[kind] = max(share, shares.get(kind, 0.0))
        return shares

    def full_at(self) -> dict[str, float]:
        """The requests/s at which the busiest resource of each kind would be busy all the time."""
        rate = 1000 * self.num_started / self.last_arrival_ms
        return {kind: rate / share for kind, share in self.utilisation().items() if share}


class Simulation:
    """One run. ``run`` may be called once."""

    def __init__(self, machines: Machines, times: ServiceTimes, router: Router, seed: int) -> None:
        self._machines, self._times, self._router, self._seed = machines, times, router, seed
        self._environment = environment = simpy.Environment()
        self._outcome = RunFigures()
        self._names: dict[Any, tuple[str, int]] = {}
        self._nodes = [self._resource("bank nodes", n, machines.node_cores) for n in range(machines.nodes)]
        self._postgres = self._resource("PostgreSQL", 0, machines.postgres_cores)
        self._redis_servers = [self._resource("Redis", n, 1) for n in range(machines.redis_servers)]
        self._redis = Lru(machines.redis)
        self._servers = [
            SimulatedServer(
                Lru(machines.pool), Lru(machines.arena),
                simpy.Resource(environment, machines.permits), self._resource("servers' batches", n, machines.slots),
            )
            for n in range(machines.servers)
        ]  # fmt: skip
        self._node_turns = itertools.cycle(self._nodes)
        self._server_turns = itertools.cycle(range(machines.servers))
        self._ring = Ring(machines.servers)

    def run(self, rate: float, num_requests: int, num_before: int = 0) -> RunFigures:
        """``rate``: requests/s. ``num_before``: requests that only fill the caches."""
        trace = DrawnTrace.draw(self._machines, num_before + num_requests, self._seed)
        for namespace, documents in zip(trace.namespaces[:num_before], trace.documents[:num_before], strict=True):
            self._fill(self._route(namespace, documents), documents)
        self._environment.process(self._arrive(rate, trace.namespaces[num_before:], trace.documents[num_before:]))
        self._environment.run()
        return self._outcome

    def _resource(self, kind: str, number: int, places: int) -> Any:
        made = simpy.Resource(self._environment, places)
        self._names[made] = kind, number
        self._outcome.places[kind, number] = places
        return made

    def _route(self, namespace: int, documents: Sequence[int]) -> SimulatedServer:
        if self._router == "round robin":
            return self._servers[next(self._server_turns)]
        return self._servers[self._ring.server_of(documents[0] if self._router == "by document" else namespace)]

    def _fill(self, server: SimulatedServer, documents: Sequence[int]) -> None:
        for document in documents:
            if not server.arena.take(document):
                self._level_below(document)
                server.arena.put(document)
            if not server.pool.take(document):
                server.pool.put(document)

    def _level_below(self, document: int) -> str:
        """The level that has a document which an arena lacks. Redis has it then."""
        if self._redis.take(document):
            return "redis"
        self._redis.put(document)
        return "store"

    def _arrive(self, rate: float, namespaces: list[int], documents: list[tuple[int, ...]]) -> Steps:
        pauses = np.random.default_rng([self._seed, 2]).exponential(1000 / rate, len(documents))
        for pause, namespace, wanted in zip(pauses.tolist(), namespaces, documents, strict=True):
            yield self._environment.timeout(pause)
            self._outcome.num_started += 1
            self._environment.process(self._request(self._route(namespace, wanted), wanted))
        self._outcome.last_arrival_ms = self._environment.now

    def _request(self, server: SimulatedServer, documents: Sequence[int]) -> Steps:
        arrived, times = self._environment.now, self._times
        with server.permits.request() as permit:
            yield permit
            yield from self._use(next(self._node_turns), times.embed + times.node)
            yield from self._use(self._postgres, times.sql)
            missing = [document for document in documents if not server.arena.take(document)]
            self._outcome.levels.update(
                "pool" if server.pool.take(document) else "arena" for document in documents if document not in missing
            )
            if missing:
                yield from self._fetch(missing)
            for document in missing:
                server.arena.put(document)
        unloaded = [document for document in documents if not server.pool.take(document)]
        yield self._environment.timeout(times.resident + times.resident_document * len(unloaded))
        for document in unloaded:
            server.pool.put(document)
        self._outcome.resident_ms.append(self._environment.now - arrived)
        yield from self._use(server.slots, times.answer)
        self._outcome.num_answered += 1

    def _fetch(self, documents: Sequence[int]) -> Steps:
        """One call to a node, which reads the gradients one after the other."""
        node = next(self._node_turns)
        for document in documents:
            level = self._level_below(document)
            self._outcome.levels[level] += 1
            yield from self._use(self._redis_servers[document % len(self._redis_servers)], self._times.redis_gradient)
            if level == "store":
                yield self._environment.timeout(self._times.store_gradient)
            yield from self._use(node, self._times.node_gradient)

    def _use(self, resource: Any, milliseconds: float) -> Steps:
        with resource.request() as place:
            yield place
            yield self._environment.timeout(milliseconds)
        self._outcome.busy_ms[self._names[resource]] += milliseconds


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
