"""Cues: sentences of the documents for the prompt. They help the model to find the knowledge in the adapter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bank_service.values.embedder import Embedder, embedded_text
from bank_service.values.sentences import choose_cue, sentence_places

_KEPT = 1 << 15  # vectors, 1.5 KiB each


def sentences(title: str, text: str) -> list[tuple[str, str]]:
    """(title, sentence) for each sentence. There is at least one."""
    return [(title, text[start:end]) for start, end in sentence_places(text) or [(0, len(text))]]


class Cues:
    """Finds sentences with the bank's embedder. The title is prepended to each sentence."""

    def __init__(self, embedder: Embedder, number: int = 1) -> None:
        """number: sentences of a cue, at least 1. Short documents may have fewer."""
        self._number = number
        self._embed = lru_cache(maxsize=_KEPT)(embedder.embed)

    def nearest(self, question: str, documents: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """(title, sentence) for each sentence of a cue, nearest to the question first. ``choose_cue`` has the rule."""
        found = [sentences(*document) for document in documents]
        asked = self._embed(question)
        vectors = [np.stack([self._embed(embedded_text(*sentence)) for sentence in some]) for some in found]
        texts = [[sentence for _, sentence in some] for some in found]
        chosen = choose_cue(texts, [(some @ asked).tolist() for some in vectors], self._number)
        return tuple(found[document][place] for document, place in chosen)

    @staticmethod
    def any(documents: Sequence[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
        """(title, sentence) for a random sentence of a random document."""
        return rng.choice(sentences(*rng.choice(documents)))
