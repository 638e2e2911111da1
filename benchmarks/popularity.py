"""How often documents are asked for, and the share of it that a cache answers. Numbers of documents up to 10⁹.

The law is Zipf's, as in the load benchmark (``regrad_vllm/load/traffic.py``). By its exponent the most popular fifth
gets 74% of the references. Neighbouring ranks share a bin, so that 10⁹ of them fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regrad_vllm.load.traffic import TOP_FIFTH_SHARE

Float64Array = npt.NDArray[np.float64]
_EXACT = 10_000  # ranks with a bin of their own
_BINS = 4_000  # of the others, up to the fifth and beyond it
_STEPS = 60  # of each bisection


@dataclass(frozen=True, slots=True)
class Popularity:
    """Bins of documents of about one popularity."""

    counts: Float64Array  # (bins,) documents in each
    shares: Float64Array  # (bins,) of the references to one document of each, the most popular first
    exponent: float

    @classmethod
    def zipf(cls, num_documents: int, top_fifth_share: float = TOP_FIFTH_SHARE) -> Popularity:
        """ValueError for fewer than five documents, or a share that isn't between a fifth and 1."""
        if num_documents < 5:
            raise ValueError(f"five documents or more are needed, got {num_documents}")
        if not 0.2 <= top_fifth_share < 1:
            raise ValueError(f"top_fifth_share must be at least 0.2 and less than 1, got {top_fifth_share}")
        fifth = num_documents // 5
        exact = min(_EXACT, num_documents)
        edges = [np.arange(1, exact + 1, dtype=np.float64)]
        for start, end in ((exact, fifth), (max(exact, fifth), num_documents)):
            if end > start:
                edges.append(np.unique(np.geomspace(start, end, _BINS).round())[1:])
        last = np.concatenate(edges)  # rank of the last document in each bin
        counts = np.diff(last, prepend=0.0)
        ranks = last - (counts - 1) / 2
        low, high = 0.0, 4.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            weights = counts * ranks**-middle
            low, high = (
                (middle, high) if weights[last <= fifth].sum() < top_fifth_share * weights.sum() else (low, middle)
            )
        weights = ranks**-low
        return cls(counts, weights / (counts * weights).sum(), low)

    def hit_ratio(self, num_cached: float) -> float:
        """The share of the references that a cache of the ``num_cached`` latest documents (LRU) has.

        By Che's approximation a document is there if it was asked for in the last T references. T is such that
        ``num_cached`` documents were. 1 if all fit.
        """
        if num_cached >= self.counts.sum():
            return 1.0
        if num_cached <= 0:
            return 0.0
        low, high = 0.0, 60.0  # of the logarithm of T
        for _ in range(_STEPS):
            middle = (low + high) / 2
            there = -np.expm1(-self.shares * np.exp(middle))
            low, high = (middle, high) if (self.counts * there).sum() < num_cached else (low, middle)
        return float((self.counts * self.shares * -np.expm1(-self.shares * np.exp(low))).sum())

    def distinct(self, num_references: float) -> float:
        """The expected number of different documents among so many references."""
        return float((self.counts * -np.expm1(num_references * np.log1p(-self.shares))).sum())
