"""The sentences of a text, and the choice of those for a cue.

A cue is a few sentences of the documents, nearest to a question. Banks and training both make cues here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

STOPS = ".!?…"  # they end a sentence before white space
CLEAR_STOPS = "。！？｡।॥؟۔։።៕။།"  # they end a sentence anywhere
WIDE_STOPS = "．～"  # they end a sentence anywhere but before a digit, as in "３．１４" and "5～10"
CLOSERS = "\"'”’»)]」』）】》"
MAX_SENTENCES = 64  # of one text that can be in a cue; the rest is left out
MAX_SENTENCE_CHARS = 1000  # of a sentence of a cue; a longer one is cut into several
_CLOSED = f"[{re.escape(CLOSERS)}]*"
_SENTENCE_END = re.compile(rf"[{STOPS}]{_CLOSED}\s+|[{CLEAR_STOPS}]{_CLOSED}|[{WIDE_STOPS}](?!\d){_CLOSED}")


def split_sentences(paragraph: str) -> Iterator[str]:
    """The paragraph's sentences in order."""
    return (paragraph[start:end] for start, end in _places(paragraph, 0, len(paragraph)))


def split_lines(text: str) -> list[str]:
    """The sentences of each line in order."""
    return [text[start:end] for start, end in _places_in_lines(text)]


def sentence_places(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence that can be in a cue, in characters. A blank text has none.

    A line's end is a sentence's end. MAX_SENTENCES and MAX_SENTENCE_CHARS bound them.
    """
    places: list[tuple[int, int]] = []
    for start, end in _places_in_lines(text):
        while end - start > MAX_SENTENCE_CHARS:
            space = text.rfind(" ", start + 1, start + MAX_SENTENCE_CHARS + 1)
            cut = space if space > 0 else start + MAX_SENTENCE_CHARS
            places += _stripped(text, start, cut)
            start = cut
        places += _stripped(text, start, end)
        if len(places) >= MAX_SENTENCES:
            break
    return places[:MAX_SENTENCES]


def choose_cue(
    sentences: Sequence[Sequence[str]], cosines: Sequence[Sequence[float]], number: int
) -> list[tuple[int, int]]:
    """(document, sentence) for each of up to ``number`` sentences, nearest to the question first.

    They are the nearest ones of all documents together. A sentence of several documents, such as one of overlapping
    passages, is given once. ``cosines`` are those of the documents' ``sentences`` and the question.
    """
    places = [(document, place) for document, texts in enumerate(sentences) for place in range(len(texts))]
    places.sort(key=lambda at: -cosines[at[0]][at[1]])
    nearest: dict[str, tuple[int, int]] = {}
    for document, place in places:
        nearest.setdefault(sentences[document][place], (document, place))
    return list(nearest.values())[:number]


def _places_in_lines(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for line in text.splitlines(keepends=True):
        yield from _places(text, start, start + len(line))
        start += len(line)


def _places(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for stop in _SENTENCE_END.finditer(text, start, end):
        yield from _stripped(text, start, stop.end())
        start = stop.end()
    yield from _stripped(text, start, end)


def _stripped(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The place without the white space at its ends. Nothing if there is no more."""
    part = text[start:end]
    begin = start + len(part) - len(part.lstrip())
    stripped = part.strip()
    return [(begin, begin + len(stripped))] if stripped else []
