"""Exact match, token F1 and bootstrap intervals, as for SQuAD (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regrad_vllm.data.questions import Kind

NUM_SAMPLES = 2000  # of the bootstrap
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the normalised prediction is one of the answers, else 0.0. Nothing answered is wrong."""
    predicted = normalise(prediction)
    return float(bool(predicted) and any(predicted == normalise(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 over the answers, of the tokens that prediction and answer share. Nothing answered is 0."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def score(prediction: str, answers: Sequence[str], kind: Kind) -> float:
    """F1; or the accuracy: 1.0 where a choice is a right one, where the answer to yes or no begins with it."""
    if kind == "span":
        return token_f1(prediction, answers)
    said = _plain_words(prediction)
    expected = [_plain_words(answer) for answer in answers]
    if kind == "choice":
        return float(said in expected)
    return float(any(said[: len(answer)] == answer for answer in expected))


def _plain_words(text: str) -> list[str]:
    """Lower case, without punctuation; articles stay, "A" may be a choice."""
    return text.lower().translate(_PUNCTUATION).split()


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap 95% interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float], clusters: Sequence[str] | None = None, *, seed: int = 0) -> Interval:
    """Percentile bootstrap over clusters, or over questions. ValueError for no values."""
    return stratified_interval([values], None if clusters is None else [clusters], seed=seed)


def stratified_interval(
    groups: Sequence[Sequence[float]], clusters: Sequence[Sequence[str]] | None = None, *, seed: int = 0
) -> Interval:
    """Mean of the groups' means; the percentile bootstrap draws within each group. ValueError for an empty group.

    clusters: each value's cluster. Values of one cluster are drawn together, because questions about one document are
    right or wrong together. For a paired difference, give the differences of each question.
    """
    if not groups or not all(groups):
        raise ValueError("values must not be empty; nothing was answered")
    rng = np.random.default_rng(seed)
    means = np.zeros(NUM_SAMPLES)
    for index, values in enumerate(groups):
        _, places = np.unique(range(len(values)) if clusters is None else clusters[index], return_inverse=True)
        sums, counts = np.bincount(places, values), np.bincount(places)
        drawn = rng.integers(0, len(sums), (NUM_SAMPLES, len(sums)))
        means += sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) / len(groups)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(np.mean([np.mean(values) for values in groups])), float(low), float(high))
