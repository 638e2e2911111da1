"""When requests arrive: so many at a time, by a Poisson process, or as a trace says."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["closed", "poisson", "trace"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """closed: ``value`` requests at a time, the next when one ends. poisson: ``value`` requests a second.
    trace: as recorded, ``value`` times as fast."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"the {self.kind} arrival's value must be above 0, got {self.value}")


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """A recorded request."""

    at_s: float  # since the first
    question: str


def offsets(arrival: Arrival, num: int, rng: random.Random, trace: Sequence[TraceEntry] = ()) -> list[float] | None:
    """Seconds from the start at which each request is sent; None where each waits for one before it (closed)."""
    if arrival.kind == "closed":
        return None
    if arrival.kind == "trace":
        return [entry.at_s / arrival.value for entry in trace[:num]]
    times, now = [], 0.0
    for _ in range(num):
        times.append(now)
        now += rng.expovariate(arrival.value)
    return times


def load_trace(path: Path) -> list[TraceEntry]:
    """JSON Lines {"at_s": seconds, "question": text}, in order of time. ValueError names the line and the field."""
    entries: list[TraceEntry] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                entries.append(_entry(f"{path.name}:{number}", line, entries[-1].at_s if entries else 0.0))
    if not entries:
        raise ValueError(f"{path} must hold at least one request, it is empty")
    first = entries[0].at_s
    return [TraceEntry(entry.at_s - first, entry.question) for entry in entries]


def _entry(place: str, line: str, earliest: float) -> TraceEntry:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(value).__name__}")
    at_s, question = value.get("at_s"), value.get("question")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not earliest <= at_s < float("inf"):
        raise ValueError(f"{place}: at_s must be seconds, not before the line above ({earliest:g}), got {at_s!r}")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: question must be a text that isn't blank, got {question!r}")
    return TraceEntry(float(at_s), question.strip())
