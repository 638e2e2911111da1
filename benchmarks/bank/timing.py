"""Measures calls, one at a time and many in flight, and summarises their times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from regrad_vllm.reporting.intervals import spread

T = TypeVar("T")
WIDTH = 8  # calls in flight
PASS_SECONDS = 60.0  # the most time of one pass; slow calls are measured on fewer items, as their count shows


async def one_at_a_time(
    call: Callable[[T], Awaitable[Any]], items: Sequence[T], seconds: float = PASS_SECONDS, rest: float = 0.0
) -> tuple[list[float], list[Any]]:
    """The milliseconds and the result of each call. ``rest``: seconds before each, which don't count."""
    times, results = [], []
    end = time.perf_counter() + seconds
    for item in items:
        if rest:
            await asyncio.sleep(rest)
        started = time.perf_counter()
        results.append(await call(item))
        times.append(1e3 * (time.perf_counter() - started))
        if time.perf_counter() > end:
            break
    return times, results


async def in_flight(
    call: Callable[[T], Awaitable[Any]], items: Iterable[T], seconds: float = PASS_SECONDS, width: int = WIDTH
) -> tuple[list[float], float]:
    """Milliseconds of each call with ``width`` of them at once, and calls/s. It begins no call after ``seconds``."""
    times: list[float] = []
    rest = iter(items)
    end = time.perf_counter() + seconds

    async def worker() -> None:
        for item in rest:
            started = time.perf_counter()
            await call(item)
            times.append(1e3 * (time.perf_counter() - started))
            if time.perf_counter() > end:
                return

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(width)))
    return times, len(times) / (time.perf_counter() - started)


def quantiles(passes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """p50 and p99 of each pass, as median and spread over the passes, and the number of calls in the smallest pass."""
    return {
        "p50_ms": spread([percentile(times, 50) for times in passes]),
        "p99_ms": spread([percentile(times, 99) for times in passes]),
        "calls": min(map(len, passes)),
    }


def percentile(times: Sequence[float], percent: float) -> float:
    return float(np.percentile(times, percent))


def recall(found: Sequence[Sequence[int]], truth: np.ndarray) -> float:
    """The share of the exact nearest documents that was found. truth: (at least len(found), k); -1 is no document."""
    pairs = [(set(each), set(best) - {-1}) for each, best in zip(found, truth.tolist(), strict=False)]
    return round(float(np.mean([len(each & best) / len(best) for each, best in pairs])), 4)
