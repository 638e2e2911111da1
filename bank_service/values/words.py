"""Text → words for BM25, the same for documents and queries.

Different spellings of one text have the same words: composed or decomposed accents, full-width letters, ligatures,
capitals, letters without their accents. Scripts without spaces have no word ends. There each character and each pair of
neighbours counts as a word of a document, as in Lucene's CJK analyzer. Korean particles have no spaces either.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

# Words of another version can differ. The number counts changes of this module; Unicode's tables come with Python.
VERSION = f"1 Unicode {unicodedata.unidata_version}"
MAX_MARKS = 30  # of one letter; Unicode's stream-safe text format (UAX 15) has the same limit

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_WITHOUT_SPACES = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u318f\u31f0-\u31ff\u3400-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]+)"
)  # Thai, Lao, Burmese, Khmer, Japanese, Chinese, Korean
_IN_WORDS = re.compile("[\u00ad\u180e\u200c\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")  # soft hyphen etc.


def document_words(text: str) -> str:
    """All words of a document, with a space between two of them."""
    words: list[str] = []
    for word, has_spaces in _parts(text):
        if has_spaces:
            words.append(word)
        else:
            words += word
            words += _pairs(word)
    return " ".join(words)


def query_words(text: str) -> list[str]:
    """All words of a query, in order. In a script without spaces these are pairs, or a lone character."""
    words: list[str] = []
    for word, has_spaces in _parts(text):
        words += [word] if has_spaces or len(word) == 1 else _pairs(word)
    return words


def _pairs(word: str) -> list[str]:
    return [word[start : start + 2] for start in range(len(word) - 1)]


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text between spaces and punctuation, and whether their script has spaces."""
    if text.isascii():
        yield from ((word, True) for word in _ASCII_WORD.findall(text.lower()))
        return
    for run in _plain(text).split():
        if run.isascii():
            yield run, True
            continue
        for number, part in enumerate(_WITHOUT_SPACES.split(run)):
            if any(map(str.isalnum, part)):
                yield part, number % 2 == 0


def _plain(text: str) -> str:
    """The text in one spelling, with spaces between its words."""
    text = unicodedata.normalize("NFKD", _decomposed(_IN_WORDS.sub("", text)))
    text = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFKC", text.translate({ord(letter): _replaced(letter) for letter in set(text)}))


def _decomposed(text: str) -> str:
    """The text with decomposed letters, and with at most MAX_MARKS marks one after another.

    ``normalize`` sorts the marks of a letter. It takes time in the square of their number, and holds the GIL.
    """
    text = text.translate({ord(letter): unicodedata.normalize("NFKD", letter) for letter in set(text)})
    marks = "".join(sorted(filter(unicodedata.combining, set(text))))
    return re.sub(f"([{marks}]{{{MAX_MARKS}}})[{marks}]+", r"\1", text) if marks else text


@lru_cache(maxsize=10_000)
def _replaced(letter: str) -> str:
    """The letter, "" for an accent, or a space for a character that is in no word."""
    if letter.isalnum():
        return letter
    if unicodedata.category(letter) not in ("Mn", "Mc"):
        return " "
    # Marks that change the letter stay: of Indic scripts, Thai, Lao, Tibetan and kana. Other classes are accents.
    kind = unicodedata.combining(letter)
    return "" if 10 <= kind < 84 or kind >= 200 else letter
