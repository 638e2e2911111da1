"""What is measured: a cell is one contender under one condition, once, with the machine to itself."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from regrad_vllm.load.arrivals import Arrival
from regrad_vllm.load.popularity import Popularity

# cost: the main comparison. curve: throughput against latency. growth: over k and the length of documents.
# quality: answers of free length. warm-up: thrown away.
Phase = Literal["warm-up", "cost", "curve", "growth", "quality"]
Status = Literal["completed", "failed", "incomplete"]  # incomplete: still running when the cell's time was up


@dataclass(frozen=True, slots=True)
class Condition:
    """All that is the same for the contenders of one comparison."""

    phase: Phase
    corpus: str  # the bank's namespace
    passage_tokens: int  # 0: passages as they are
    top_k: int
    popularity: Popularity
    prefix_cache: bool
    arrival: Arrival
    output_tokens: int  # 0: up to the model
    num_requests: int

    @property
    def key(self) -> str:
        """A name for people and files."""
        arrival = f"{self.arrival.kind}-{self.arrival.value:g}"
        cache = "cached" if self.prefix_cache else "uncached"
        return f"{self.phase}/{self.corpus}/k{self.top_k}/{self.popularity}/{cache}/{arrival}/{self.output_tokens}"

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request, as it was: times in ms from its own start, which is before anything is sent for it."""

    condition: str
    contender: str
    repeat: int
    index: int
    question_id: str
    sent_s: float  # since the cell's start
    late_ms: float  # sent so much after its time of arrival
    status: Status
    error: str = ""
    retrieve_ms: float = 0.0  # by the client; the server's own retrieval is part of its first token
    prepare_ms: float = 0.0  # by the client: composing, writing and loading an adapter
    event_ms: tuple[float, ...] = ()  # arrival of each event with new tokens
    end_ms: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    documents: tuple[str, ...] = ()  # that it was answered with
    moved_bytes: int = 0  # texts of passages; gradients and adapter files of the client
    server_ms: Mapping[str, float] = field(default_factory=dict)  # what the server took for its adapter, by stage
    text: str = ""


@dataclass(frozen=True, slots=True)
class CellLine:
    """What a cell took from the machine."""

    condition: str
    contender: str
    repeat: int
    seconds: float  # from the first request's start to the last one's end
    cpu_s: Mapping[str, float] = field(default_factory=dict)  # by process
    peak_bytes: Mapping[str, int] = field(default_factory=dict)  # proportional set size by process
    peak_kv_share: float | None = None  # of the engine's KV blocks
    preemptions: float | None = None
    fetched_bytes: float | None = None  # gradients from the bank to the server
    cache_hits: Mapping[str, float] = field(default_factory=dict)  # share by cache: prefix, arena, worker


def interleaved(
    conditions: Sequence[tuple[Condition, Sequence[str]]], repeats: int, seed: int
) -> list[tuple[Condition, str, int]]:
    """(condition, contender, repeat) in the order of running: every repeat all of them, each time in another order, so
    that no contender always comes after the same one."""
    order = []
    for repeat in range(repeats):
        for condition, names in conditions:
            shuffled = list(names)
            random.Random(f"regrad.load.order.{seed}.{condition.key}.{repeat}").shuffle(shuffled)
            order += [(condition, name, repeat) for name in shuffled]
    return order
