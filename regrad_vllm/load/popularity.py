"""Which documents are asked about: a few all the time, as in real traces, or all alike, the worst case for caches.

On a published RAG trace (7,106 requests) the most popular fifth of the passages takes 74% of the references, and 17% of
the requests have a set of passages that came before as a whole.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from regrad_vllm.data.questions import Question

Popularity = Literal["zipf", "uniform"]
TOP_FIFTH_SHARE = 0.74  # of all references, on the trace
_FIFTH = 0.2
_MAX_EXPONENT = 4.0
_STEPS = 60  # of the bisection


def zipf_exponent(num: int, share: float = TOP_FIFTH_SHARE) -> float:
    """s such that of ``num`` documents with weights rank^−s the first fifth has ``share`` of the sum.

    0 for less than five documents. ValueError where share isn't between a fifth and 1.
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
    """Each with a number of its own at its end, for no two users ask in the same words: the documents may be in every
    cache, the whole prompt, and the composed adapter, whose weights follow the scores, are in none."""
    return [replace(question, question=f"{question.question} ({rng.randrange(10**6)})") for question in questions]


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a stream of requests looks like to a cache."""

    references: int  # requests times their documents
    top_fifth_share: float  # of the references that go to the most popular fifth of the documents that were used
    repeated_sets: float  # share of the requests whose documents, as a set, came before


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
