"""Cues: sentences of the documents for the prompt. They help the model to find the knowledge in the adapter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bank_service.values.embedder import Embedder, embedded_text
from regrad_vllm.data.passages import split_sentences

_KEPT = 1 << 15  # vectors, 1.5 KiB each


def sentences(title: str, text: str) -> list[tuple[str, str]]:
    """(title, sentence) for each sentence. There is at least one."""
    found = [sentence for line in text.splitlines() for sentence in split_sentences(line.strip())]
    return [(title, sentence) for sentence in found or [text]]


class Cues:
    """Finds sentences with the bank's embedder. The title is prepended to each sentence."""

    def __init__(self, embedder: Embedder, number: int = 1) -> None:
        """number: sentences of a cue, at least 1. Short documents may have fewer."""
        self._number = number
        self._embed = lru_cache(maxsize=_KEPT)(embedder.embed)

    def nearest(self, question: str, documents: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """(title, sentence) for each sentence of a cue, nearest to the question first.

        Each document gives its nearest sentence before any gives a second one.
        """
        found = [(place, sentence) for place, document in enumerate(documents) for sentence in sentences(*document)]
        vectors = np.stack([self._embed(embedded_text(*sentence)) for _, sentence in found])
        order = [int(at) for at in np.argsort(-(vectors @ self._embed(question)), kind="stable")]
        best_of: dict[int, int] = {}  # place of a document → its nearest sentence
        for at in order:
            best_of.setdefault(found[at][0], at)
        firsts = set(best_of.values())
        chosen = [*(at for at in order if at in firsts), *(at for at in order if at not in firsts)][: self._number]
        return tuple(found[at][1] for at in order if at in chosen)

    @staticmethod
    def any(documents: Sequence[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
        """(title, sentence) for a random sentence of a random document."""
        return rng.choice(sentences(*rng.choice(documents)))
