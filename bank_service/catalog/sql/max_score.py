"""Finds the best documents for a text by BM25, without a score for every document that has a word of it.

Common words occur in a large part of a namespace. But a word adds at most (k1 + 1) · idf to a score, which is little
for a common word. So only the rarest words are **essential**: a document without any of them can't reach the best
``count``. Only documents with an essential word are scored, by all words. The result is exact. This is MaxScore (Turtle
and Flood, 1995) with a query's words as the lists. If it would save little, all documents with a word are scored.

Scores are rounded, so that the order of a sum does not decide between equally good documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bank_service.values.words import query_words

MAX_WORDS = 128  # words of a query that are searched; each has a list of documents to read
WORTHWHILE = 0.25  # if the essential words have a larger share of all list entries, all documents are scored
SATURATION = 2.2  # k1 + 1 of BM25: a word adds at most so many times its idf to a score
DIGITS = 9  # decimal places of a score; sums of floats are exact to about 14
_LEAST_IDF = 1e-6  # of a word in half of the documents or more
_ROUNDING = 10.0**-DIGITS


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a query that occurs in the namespace."""

    text: str
    num_documents: int  # of the namespace that have it
    idf: float

    @property
    def bound(self) -> float:
        """The most that the word adds to a document's score."""
        return SATURATION * self.idf


def searched_words(text: str) -> list[str]:
    """The different words of a user's text. Of more than MAX_WORDS the first and the last ones, because a question may
    stand before or behind a long text."""
    words = query_words(text)
    first, last = list(dict.fromkeys(words)), list(dict.fromkeys(reversed(words)))
    half = MAX_WORDS // 2
    return first if len(first) <= MAX_WORDS else list(dict.fromkeys([*first[:half], *last[:half]]))


def weighed(num_documents: Mapping[str, int], total: int) -> list[Word]:
    """The words that occur, the rarest first. ``num_documents``: how many have a word; ``total``: of the namespace."""
    words = [
        # Without the lower bound, a word in half of the documents or more would have idf ≤ 0.
        Word(text, number, max(math.log((total - number + 0.5) / (number + 0.5)), _LEAST_IDF))
        for text, number in num_documents.items()
        if number
    ]
    return sorted(words, key=lambda word: word.num_documents)


def best_documents(words: Sequence[Word], count: int, search: Callable[[int], dict[int, float]]) -> dict[int, float]:
    """key → score of up to ``count`` documents, best first.

    ``words``: the rarest first. ``search(n)`` gives the best ``count`` of those that have one of the first n words.
    """
    if not words:
        return {}
    num_essential = _guess(words, count)
    while True:
        if _postings(words[:num_essential]) > WORTHWHILE * _postings(words):
            num_essential = len(words)
        found = search(num_essential)
        # A document that was not scored could be as good as the last one found.
        least = min(found.values()) - 2 * _ROUNDING if len(found) == count else 0.0
        needed = _needed(words, least)
        if needed <= num_essential:
            return found
        num_essential = needed


def _needed(words: Sequence[Word], least: float) -> int:
    """The number of rarest words that are essential, if a document needs at least the score ``least``."""
    return next((n for n in range(len(words)) if sum(word.bound for word in words[n:]) < least), len(words))


def _guess(words: Sequence[Word], count: int) -> int:
    """Guesses the number of essential words for the first search. A wrong guess costs only a second search.

    Takes the rarest words until ``count`` documents have one. It assumes that the last of these documents has only the
    last word, once, in a text of mean length. Its score then gives the number of words that are needed.
    """
    reached = 0
    for index, word in enumerate(words, 1):
        reached += word.num_documents
        if reached >= count:
            return max(index, _needed(words, word.bound / SATURATION))
    return len(words)


def _postings(words: Sequence[Word]) -> int:
    return sum(word.num_documents for word in words)
