"""The plugin's metrics in vLLM's /metrics. A server process makes them once. Their names start with ``regrad_``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from regrad_vllm.serve.arena.arena import ArenaFigures

_MS_BUCKETS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counters and histograms of the API server process."""

    requests: Counter  # by outcome: adapter, base (switched off, or no document found), fallback; and by mode
    second_answers: Counter  # in mode auto
    errors: Counter  # by HTTP status
    timings: Mapping[str, Histogram]  # of a request: retrieve, fetch, resident
    fetched_bytes: Counter
    arena_bytes: Gauge
    arena_records: Gauge
    arena_holds: Gauge
    arena_lookups: Counter  # by result: hit, miss
    arena_evictions: Counter
    worker_bytes: Gauge  # by worker, "rank/number"
    worker_records: Gauge
    worker_lookups: Gauge  # by worker and result: counts since the worker's start
    worker_evictions: Gauge
    worker_late: Gauge
    worker_lost: Gauge

    @classmethod
    def create(cls, registry: CollectorRegistry = REGISTRY) -> Metrics:
        """Registers all metrics. ValueError if this registry has them already."""

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(name, what, buckets=_MS_BUCKETS, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, multiprocess_mode="livesum", registry=registry)

        def of_workers(name: str, what: str, *labels: str) -> Gauge:  # every API server reports all workers
            return Gauge(name, what, ["worker", *labels], multiprocess_mode="livemostrecent", registry=registry)

        return cls(
            requests=Counter("regrad_requests", "Requests that ReGrad was for", ["outcome", "mode"], registry=registry),
            second_answers=Counter("regrad_second_answers", "Asked again with the documents", registry=registry),
            errors=Counter("regrad_errors", "Requests refused by ReGrad", ["status"], registry=registry),
            timings={
                "retrieve": histogram("regrad_retrieve_ms", "Query to the bank"),
                "fetch": histogram("regrad_fetch_ms", "Gradients from the bank into the arena"),
                "resident": histogram("regrad_resident_ms", "Making the documents resident in the workers"),
            },
            fetched_bytes=Counter("regrad_fetched_bytes", "Gradient bytes fetched from the bank", registry=registry),
            arena_bytes=gauge("regrad_arena_bytes", "Gradient bytes in the arena"),
            arena_records=gauge("regrad_arena_records", "Gradients in the arena"),
            arena_holds=gauge("regrad_arena_holds", "Requests that hold gradients"),
            arena_lookups=Counter("regrad_arena_lookups", "Gradients wanted there", ["result"], registry=registry),
            arena_evictions=Counter("regrad_arena_evictions", "Gradients that made room", registry=registry),
            worker_bytes=of_workers("regrad_worker_bytes", "Bytes of documents in a worker's pool"),
            worker_records=of_workers("regrad_worker_records", "Documents in a worker's pool"),
            worker_lookups=of_workers("regrad_worker_lookups", "Documents wanted there since its start", "result"),
            worker_evictions=of_workers("regrad_worker_evictions", "Documents that made room there"),
            worker_late=of_workers("regrad_worker_late", "Requests whose documents came inside a step"),
            worker_lost=of_workers("regrad_worker_lost", "Requests that ran without their documents"),
        )

    def observe_arena(self, figures: ArenaFigures, seen_evictions: int) -> None:
        """Records the arena's figures. seen_evictions: the evictions that were counted before."""
        self.arena_bytes.set(figures.used_bytes)
        self.arena_records.set(figures.num_records)
        self.arena_holds.set(figures.num_holds)
        self.arena_evictions.inc(figures.num_evictions - seen_evictions)

    def observe_worker(self, worker: str, pool: Mapping[str, int]) -> None:
        """Records a worker's figures: ``PoolFigures``, and ``num_late`` and ``num_lost`` of its ``Steps``."""
        self.worker_bytes.labels(worker).set(pool["used_bytes"])
        self.worker_records.labels(worker).set(pool["num_documents"])
        self.worker_lookups.labels(worker, "hit").set(pool["num_hits"])
        self.worker_lookups.labels(worker, "miss").set(pool["num_misses"])
        self.worker_evictions.labels(worker).set(pool["num_evictions"])
        self.worker_late.labels(worker).set(pool["num_late"])
        self.worker_lost.labels(worker).set(pool["num_lost"])
