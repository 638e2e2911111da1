"""The traffic: the arrival times of the requests, and the documents that they ask about.

Requests arrive a fixed number at a time, by a Poisson process, or as in a trace. Either all documents are equally
popular, which is the worst case for caches, or a few get most of the requests. On a published RAG trace (7,106
requests) the most popular fifth of the passages takes 74% of the references. 17% of its requests repeat the whole set
of passages of an earlier request.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from regrad_vllm.data.questions import Question

Kind = Literal["closed", "poisson", "trace"]
Popularity = Literal["zipf", "uniform"]
TOP_FIFTH_SHARE = 0.74  # of all references in the published trace
_FIFTH = 0.2
_MAX_EXPONENT = 4.0
_STEPS = 60  # of the bisection


@dataclass(frozen=True, slots=True)
class Arrival:
    """The way in which requests arrive.

    - "closed": ``value`` requests at a time; the end of one starts the next.
    - "poisson": ``value`` requests per second.
    - "trace": as recorded, ``value`` times as fast.
    """

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
    """Seconds from the start to each request. None for "closed", where a request waits for the end of another."""
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
    """Reads JSON Lines {"at_s": seconds, "question": text}, in order of time. ValueError names line and field."""
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


def zipf_exponent(num: int, share: float = TOP_FIFTH_SHARE) -> float:
    """The exponent s of a Zipf distribution over ``num`` documents whose first fifth has ``share`` of the sum.

    The weight of a document is rank^−s.

    0 for less than five documents. ValueError if share isn't between a fifth and 1.
    """
    if not _FIFTH <= share < 1:
        raise ValueError(f"share must be at least {_FIFTH} and below 1, got {share}")
    top = int(num * _FIFTH)
    if top == 0:
        return 0.0
    low, high = 0.0, _MAX_EXPONENT
    for _ in range(_STEPS):
        middle = (low + high) / 2
        weights = _weights(num, middle)
        if sum(weights[:top]) < share * sum(weights):
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Popular:
    """Draws questions: a document by its popularity, then one of its questions."""

    def __init__(self, questions: Sequence[Question], popularity: Popularity, seed: int) -> None:
        """Ranks are drawn once, from ``seed``. ValueError for no questions."""
        if not questions:
            raise ValueError("there must be at least one question, got none")
        by_document: dict[str, list[Question]] = {}
        for question in questions:
            by_document.setdefault(question.documents[0], []).append(question)
        self._groups = list(by_document.values())
        random.Random(f"regrad.load.ranks.{seed}").shuffle(self._groups)
        exponent = zipf_exponent(len(self._groups)) if popularity == "zipf" else 0.0
        self._cumulative = list(accumulate(_weights(len(self._groups), exponent)))

    def draw(self, num: int, rng: random.Random) -> list[Question]:
        groups = rng.choices(self._groups, cum_weights=self._cumulative, k=num)
        return [rng.choice(group) for group in groups]


def in_own_words(questions: Sequence[Question], rng: random.Random) -> list[Question]:
    """Adds a unique number to each question, because two users hardly ever ask in the same words.

    So the documents may be in a cache, but the whole prompt is not. The adapter is not either, because its
    weights depend on the scores.
    """
    return [replace(question, question=f"{question.question} ({rng.randrange(10**6)})") for question in questions]


@dataclass(frozen=True, slots=True)
class Reuse:
    """The reuse of documents in a stream of requests, as a cache sees it."""

    references: int  # the documents of all requests together, repeats included
    top_fifth_share: float  # share of the references to the most popular fifth of the used documents
    repeated_sets: float  # share of the requests whose set of documents an earlier request had


def reuse(hits: Sequence[Sequence[str]]) -> Reuse:
    """hits: the documents of each request, in the order of the requests. ValueError for none."""
    counts = Counter(key for found in hits for key in found)
    if not counts:
        raise ValueError("there must be at least one request with documents, got none")
    top = max(1, int(len(counts) * _FIFTH))
    share = sum(count for _, count in counts.most_common(top)) / counts.total()
    seen: set[frozenset[str]] = set()
    repeated = 0
    for found in hits:
        repeated += frozenset(found) in seen
        seen.add(frozenset(found))
    return Reuse(counts.total(), share, repeated / len(hits))


def _weights(num: int, exponent: float) -> list[float]:
    return [float(rank) ** -exponent for rank in range(1, num + 1)]
