"""What a server says of itself in /metrics, between two moments."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    import httpx

_SAMPLE_SECONDS = 1.0
_KV_USAGE = "vllm:kv_cache_usage_perc"
# Cache → (samples that count its lookups, those among them that found what they looked for).
_CACHES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "prefix": (("vllm:prefix_cache_queries_total",), "vllm:prefix_cache_hits_total"),
    "arena": (
        ("regrad_arena_lookups_total{hit}", "regrad_arena_lookups_total{miss}"), "regrad_arena_lookups_total{hit}",
    ),
    "worker": (("regrad_worker_lookups{hit}", "regrad_worker_lookups{miss}"), "regrad_worker_lookups{hit}"),
}  # fmt: skip
_FETCHED = "regrad_fetched_bytes_total"
_PREEMPTIONS = "vllm:num_preemptions_total"


@dataclass(slots=True)
class Scraped:
    """Filled when the watching ends; None and nothing where the server doesn't tell."""

    peak_kv_share: float | None = None
    preemptions: float | None = None
    fetched_bytes: float | None = None
    cache_hits: dict[str, float] = field(default_factory=dict)


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """Every sample, summed over its labels but for "result", which goes into the name in braces."""
    response = await client.get("/metrics")
    response.raise_for_status()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            result = sample.labels.get("result")
            name = f"{sample.name}{{{result}}}" if result else sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


@asynccontextmanager
async def watched(client: httpx.AsyncClient | None) -> AsyncIterator[Scraped]:
    """Watches a server while the context lasts: counters before and after, the KV cache every second."""
    import httpx

    scraped = Scraped()
    if client is None:
        yield scraped
        return
    before = await scrape(client)

    async def sample() -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):  # a sample that is missing is no reason to stop
                now = await scrape(client)
                scraped.peak_kv_share = max(scraped.peak_kv_share or 0.0, now.get(_KV_USAGE, 0.0))
            await asyncio.sleep(_SAMPLE_SECONDS)

    sampler = asyncio.create_task(sample())
    try:
        yield scraped
    finally:
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        after = await scrape(client)
        change = {name: value - before.get(name, 0.0) for name, value in after.items()}
        scraped.fetched_bytes = change.get(_FETCHED)
        scraped.preemptions = change.get(_PREEMPTIONS)
        for cache, (lookups, hits) in _CACHES.items():
            total = sum(change.get(name, 0.0) for name in lookups)
            if total:
                scraped.cache_hits[cache] = change.get(hits, 0.0) / total
