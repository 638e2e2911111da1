"""The slow obvious search by words: BM25 of every document. The oracle of the tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from bank_service.catalog.contract import CatalogView
from bank_service.values.documents import StoredDocument
from bank_service.values.filters import Condition
from bank_service.values.words import document_words, query_words


class PlainWords:
    """Implements ``catalog.contract.WordSearch``. Keeps the documents of the last state that it was asked about."""

    def __init__(self) -> None:
        self._sequence = -1
        self._stored: list[StoredDocument] = []

    def best(
        self, view: CatalogView, namespace: str, text: str, conditions: Sequence[Condition], count: int
    ) -> dict[int, float]:
        if view.sequence() != self._sequence:
            self._sequence, self._stored = view.sequence(), view.after_key(0, 10**6)
        stored = [item for item in self._stored if item.document.namespace == namespace]
        texts = {item.key: words_of(f"{item.document.title}\n{item.document.text}") for item in stored}
        scores = bm25(texts, list(dict.fromkeys(query_words(text))))
        matching = [
            item
            for item in stored
            if scores[item.key] > 0 and all(condition.holds(item.document.metadata) for condition in conditions)
        ]
        ranked = sorted(matching, key=lambda item: (-scores[item.key], item.document.id))
        return {item.key: scores[item.key] for item in ranked[:count]}

    async def clean(self) -> None:
        pass


@lru_cache(maxsize=4096)
def words_of(text: str) -> tuple[str, ...]:
    return tuple(document_words(text).split())


def bm25(texts: Mapping[int, Sequence[str]], words: Sequence[str]) -> dict[int, float]:
    """By key, with k1 = 1.2 and b = 0.75. Rounded, so that the order of the sum decides nothing."""
    mean = sum(map(len, texts.values())) / max(1, len(texts))
    scores = dict.fromkeys(texts, 0.0)
    for word in words:
        num = sum(word in text for text in texts.values())
        rarity = max(math.log((len(texts) - num + 0.5) / (num + 0.5)), 1e-6)
        for key, text in texts.items():
            count = text.count(word)
            scores[key] += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(text) / mean)) if count else 0.0
    return {key: round(score, 9) for key, score in scores.items()}
