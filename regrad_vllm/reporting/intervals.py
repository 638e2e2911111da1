"""How sure a figure is: bootstrap intervals of means, spreads of repeats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_SAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the repeats, with the least and the greatest."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, scale: float = 1) -> str:
        """median [least, greatest]"""
        return f"{_short(self.median * scale)} [{_short(self.low * scale)}, {_short(self.high * scale)}]"


def spread(values: Sequence[float]) -> dict[str, float]:
    """The spread of the repeats as a report's JSON has it."""
    found = Spread.of(values)
    plain = {"median": found.median, "min": found.low, "max": found.high}
    return {**{name: round(value, 4) for name, value in plain.items()}, "repeats": found.repeats}


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap 95% interval."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


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


def rounded(value: object) -> dict[str, object]:
    """The same plain data, its numbers with four digits after the point."""
    result = _rounded(value)
    assert isinstance(result, dict)
    return result


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
