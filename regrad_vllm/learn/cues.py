"""Cues: one sentence of a document for the prompt. It helps the model to find the knowledge in the adapter."""

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

    def __init__(self, embedder: Embedder) -> None:
        self._embed = lru_cache(maxsize=_KEPT)(embedder.embed)

    def nearest(self, question: str, documents: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """(title, sentence) for the sentence in ``documents`` that is nearest to the question."""
        found = [sentence for document in documents for sentence in sentences(*document)]
        vectors = np.stack([self._embed(embedded_text(*sentence)) for sentence in found])
        return found[int(np.argmax(vectors @ self._embed(question)))]

    @staticmethod
    def any(documents: Sequence[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
        """(title, sentence) for a random sentence of a random document."""
        return rng.choice(sentences(*rng.choice(documents)))
