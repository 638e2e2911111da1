"""The plugin's figures in vLLM's /metrics. Made once in a server process; names start with ``regrad_``."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_MS_BUCKETS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counters and histograms of the API server process."""

    requests: Counter  # by outcome: adapter, base (switched off, or no document scored high enough), fallback
    errors: Counter  # by HTTP status
    retrieve_ms: Histogram
    fetch_ms: Histogram
    compose_ms: Histogram
    engine_wait_ms: Histogram
    fetched_bytes: Counter
    arena_bytes: Gauge
    arena_records: Gauge
    arena_leases: Gauge

    @classmethod
    def create(cls, registry: CollectorRegistry = REGISTRY) -> Metrics:
        """Registers all metrics; ValueError where they already are in this registry."""

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(name, what, buckets=_MS_BUCKETS, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, multiprocess_mode="livesum", registry=registry)

        return cls(
            requests=Counter("regrad_requests", "Requests that ReGrad was for", ["outcome"], registry=registry),
            errors=Counter("regrad_errors", "Requests refused by ReGrad", ["status"], registry=registry),
            retrieve_ms=histogram("regrad_retrieve_ms", "Query to the bank"),
            fetch_ms=histogram("regrad_fetch_ms", "Gradients from the bank into the arena"),
            compose_ms=histogram("regrad_compose_ms", "Composing the adapter in the worker"),
            engine_wait_ms=histogram("regrad_engine_wait_ms", "Waiting for the engine's turn to compose"),
            fetched_bytes=Counter("regrad_fetched_bytes", "Gradient bytes fetched from the bank", registry=registry),
            arena_bytes=gauge("regrad_arena_bytes", "Gradient bytes in the arena"),
            arena_records=gauge("regrad_arena_records", "Gradients in the arena"),
            arena_leases=gauge("regrad_arena_leases", "Requests that pin gradients"),
        )
