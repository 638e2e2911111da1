"""Lines of requests and cells → figures. Formulas:

    TTFT    from the start of a request (before its retrieval, before anything is sent) to its first token; in an open
            loop from its scheduled arrival, so that waiting counts
    ITL     between two successive events of a stream that bring tokens
    TPOT    (end − first token) / (output tokens − 1), one value a request
    E2EL    from the start of a request, as for TTFT, to its end
    requests/s, output tokens/s    completed requests (their tokens) over the cell's seconds
    goodput    completed requests within all limits (TTFT, TPOT), over the cell's seconds

A cell's seconds go from the start of its first request to the end of its last one. Rates are medians over the repeats,
with the least and the greatest. Latencies are percentiles over the completed requests of all repeats. A p99 needs a
hundred requests. Failed and incomplete requests are counted separately.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regrad_vllm.load.comparison import CellLine, RequestLine
from regrad_vllm.reporting.intervals import Interval, Spread, bootstrap_interval

PERCENTILES = (50, 90, 99)
_FEWEST_POINTS = 3  # for a fitted line


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that a request must keep to count for goodput."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender under one condition."""

    contender: str
    completed: int
    failed: int
    incomplete: int
    requests_s: Spread
    output_tokens_s: Spread
    goodput_s: Spread
    ttft_ms: Mapping[int, float]  # percentile → ms; empty if no request was completed
    itl_ms: Mapping[int, float]
    tpot_ms: Mapping[int, float]
    e2el_ms: Mapping[int, float]
    retrieve_ms: float  # retrieval by the client, median
    prepare_ms: float
    server_ms: Mapping[str, float]  # medians of the server's times for adapters, by stage
    preemptions: float  # total
    prompt_tokens: float  # mean of a request
    output_tokens: float
    moved_bytes: float  # per request: texts, gradients and adapter files moved between processes
    cpu_s: Mapping[str, float]  # per request, by process: median over the repeats
    peak_bytes: Mapping[str, int]  # by process
    peak_kv_share: float | None
    pool_bytes: float | None  # documents in the workers' pools, of all requests together, at most
    cache_hits: Mapping[str, float]  # mean hit rate by cache
    first_error: str


@dataclass(frozen=True, slots=True)
class Quality:
    """The scores of answers of free length."""

    questions: int
    em: Interval
    f1: Interval


def figures(lines: Sequence[RequestLine], cells: Sequence[CellLine], limits: Limits) -> Figures:
    """The figures of one contender under one condition over all repeats. ValueError for no cells."""
    if not cells:
        raise ValueError("there must be at least one cell, got none")
    done = [line for line in lines if line.status == "completed"]
    by_repeat = {cell.repeat: [line for line in done if line.repeat == cell.repeat] for cell in cells}

    def rate(value: Callable[[RequestLine], float]) -> Spread:
        return Spread.of([sum(map(value, by_repeat[cell.repeat])) / cell.seconds for cell in cells])

    num = [max(1, len(by_repeat[cell.repeat])) for cell in cells]
    fetched = sum(cell.fetched_bytes or 0.0 for cell in cells)
    errors = [line.error for line in lines if line.status != "completed"]
    shares = [cell.peak_kv_share for cell in cells if cell.peak_kv_share is not None]
    pools = [cell.pool_bytes for cell in cells if cell.pool_bytes is not None]
    return Figures(
        contender=cells[0].contender,
        completed=len(done),
        failed=sum(line.status == "failed" for line in lines),
        incomplete=sum(line.status == "incomplete" for line in lines),
        requests_s=Spread.of(list(rates(lines, cells).values())),
        output_tokens_s=rate(lambda line: line.output_tokens),
        goodput_s=rate(lambda line: float(within(line, limits))),
        ttft_ms=percentiles([ttft_ms(line) for line in done]),
        itl_ms=percentiles([gap for line in done for gap in itl_ms(line)]),
        tpot_ms=percentiles([value for line in done if (value := tpot_ms(line)) is not None]),
        e2el_ms=percentiles([line.end_ms + line.late_ms for line in done]),
        retrieve_ms=statistics.median([line.retrieve_ms for line in done] or [0.0]),
        prepare_ms=statistics.median([line.prepare_ms for line in done] or [0.0]),
        server_ms={
            stage: statistics.median([line.server_ms[stage] for line in done if stage in line.server_ms])
            for stage in dict.fromkeys(stage for line in done for stage in line.server_ms)
        },
        preemptions=sum(cell.preemptions or 0.0 for cell in cells),
        prompt_tokens=_mean([line.prompt_tokens for line in done]),
        output_tokens=_mean([line.output_tokens for line in done]),
        moved_bytes=(sum(line.moved_bytes for line in done) + fetched) / max(1, len(done)),
        cpu_s={
            role: statistics.median([cell.cpu_s.get(role, 0.0) / n for cell, n in zip(cells, num, strict=True)])
            for role in dict.fromkeys(role for cell in cells for role in cell.cpu_s)
        },
        peak_bytes={
            role: max(cell.peak_bytes.get(role, 0) for cell in cells)
            for role in dict.fromkeys(role for cell in cells for role in cell.peak_bytes)
        },
        peak_kv_share=max(shares) if shares else None,
        pool_bytes=max(pools) if pools else None,
        cache_hits={
            cache: _mean([cell.cache_hits[cache] for cell in cells if cache in cell.cache_hits])
            for cache in dict.fromkeys(cache for cell in cells for cache in cell.cache_hits)
        },
        first_error=errors[0] if errors else "",
    )


def rates(lines: Sequence[RequestLine], cells: Sequence[CellLine]) -> dict[int, float]:
    """Completed requests per second, by repeat."""
    return {
        cell.repeat: sum(line.status == "completed" and line.repeat == cell.repeat for line in lines) / cell.seconds
        for cell in cells
    }


def ratio(own: Mapping[int, float], rival: Mapping[int, float]) -> Spread:
    """The ratio of own rate to the rival's rate, over the common repeats. In a repeat both have the same requests.

    ValueError if there is no common repeat, or if the rival completed nothing in one.
    """
    common = sorted(set(own) & set(rival))
    if not common or not all(rival[repeat] for repeat in common):
        raise ValueError(f"both must have completed requests in a common repeat, got {dict(own)} and {dict(rival)}")
    return Spread.of([own[repeat] / rival[repeat] for repeat in common])


def ttft_ms(line: RequestLine) -> float:
    return line.event_ms[0] + line.late_ms if line.event_ms else line.end_ms + line.late_ms


def itl_ms(line: RequestLine) -> list[float]:
    return [later - earlier for earlier, later in zip(line.event_ms, line.event_ms[1:], strict=False)]


def tpot_ms(line: RequestLine) -> float | None:
    """The time per output token after the first. None for an answer of one token."""
    if line.output_tokens < 2 or not line.event_ms:
        return None
    return (line.end_ms - line.event_ms[0]) / (line.output_tokens - 1)


def within(line: RequestLine, limits: Limits) -> bool:
    tpot = tpot_ms(line)
    return line.status == "completed" and ttft_ms(line) <= limits.ttft_ms and (tpot is None or tpot <= limits.tpot_ms)


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Percentiles by nearest rank, without those that too few values would make their maximum. Empty for no values."""
    ordered = sorted(values)
    return {
        p: ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)]
        for p in PERCENTILES
        if ordered and (p == PERCENTILES[0] or len(ordered) * (100 - p) >= 100)
    }


def quality(scores: Sequence[tuple[float, float, str]]) -> Quality:
    """The means of EM and F1. scores: (EM, F1, document) of each question, failed ones as 0. ValueError for none."""
    clusters = [document for _, _, document in scores]
    return Quality(
        len(scores),
        bootstrap_interval([em for em, _, _ in scores], clusters),
        bootstrap_interval([f1 for _, f1, _ in scores], clusters),
    )


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares y ≈ intercept + slope · x: (intercept, slope).

    ValueError for less than three different x, because two points always lie on a line.
    """
    if len({x for x, _ in points}) < _FEWEST_POINTS:
        raise ValueError(f"a slope needs points at {_FEWEST_POINTS} different x at least")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    line = statistics.linear_regression(xs, ys)
    return line.intercept, line.slope


def break_even(encode_s: float, requests_s: float, rival_requests_s: float) -> float | None:
    """The number of requests per document after which the time to encode the document is saved again.

    encode_s / (1 / rival_requests_s − 1 / requests_s). None if a request saves no time.

    encode_s: seconds per document. requests_s, rival_requests_s: requests per second. All are of the whole machine.
    """
    if not requests_s > rival_requests_s > 0:
        return None
    return encode_s / (1 / rival_requests_s - 1 / requests_s)


def kv_bytes(found: Figures, bytes_per_token: int, block_tokens: int) -> float:
    """Bytes of KV cache of one request at its end, in whole blocks that are not shared."""
    return math.ceil((found.prompt_tokens + found.output_tokens) / block_tokens) * block_tokens * bytes_per_token


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
