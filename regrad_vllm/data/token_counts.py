"""Counts the tokens of texts: by a model's own tokenizer, or by an estimate for those who have none.

The estimate is for tokenizers made for English, which cut other scripts into many tokens. It doesn't tell languages in
Latin letters apart: those with few marks, such as Dutch, have up to twice as many tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

CountTokens = Callable[[str], int]
TOKENS_PER_WORD = 1.35  # of English text, with the tokenizers of today's models
_LONGEST_TOKEN = 7  # characters; for text without spaces, such as URLs and rows of digits
_LATIN = re.compile(r"[!-\u024f\u1e00-\u1eff\u2010-\u206f]")  # letters, digits and punctuation
# First code point of a range → tokens a character there, measured with the default model's tokenizer on texts in 70
# languages. Latin letters with marks count in addition to their words.
_TOKENS_PER_CHARACTER = {
    0x0000: 0.0,  # ASCII, and Latin-1's signs
    0x00C0: 2.0,  # Latin letters with marks
    0x0250: 1.1,  # Greek, Cyrillic
    0x0530: 2.2,  # Armenian
    0x0590: 1.6,  # Hebrew, Arabic
    0x0900: 1.4,  # Devanagari
    0x0980: 3.2,  # the other scripts of India
    0x0E00: 2.3,  # Thai, Tibetan, Burmese, Georgian
    0x1100: 3.1,  # Ethiopic, Khmer
    0x1E00: 2.0,  # Latin letters with marks
    0x2000: 0.0,  # punctuation
    0x2070: 2.0,  # signs
    0x2E80: 2.1,  # Chinese, Japanese
    0xAC00: 3.0,  # Korean, emoji
}
_STARTS, _TOKENS = list(_TOKENS_PER_CHARACTER), list(_TOKENS_PER_CHARACTER.values())


def count_tokens(text: str) -> int:
    """The estimated number of tokens, at least 1."""
    num_words, num_ascii, others = len(text.split()), len(text), 0.0
    if not text.isascii():
        num_words = sum(1 for word in text.split() if _LATIN.search(word))
        rest = [ord(character) for character in text if character > "\x7f"]
        num_ascii -= len(rest)
        others = sum(_TOKENS[bisect_right(_STARTS, point) - 1] for point in rest)
    return max(1, round(max(round(TOKENS_PER_WORD * num_words), num_ascii // _LONGEST_TOKEN) + others))


def tokenizer_of(model_folder: Path) -> CountTokens:
    """Counts tokens as the model in a folder does. FileNotFoundError without its tokenizer.json."""
    from tokenizers import Tokenizer

    path = model_folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist, to count tokens; leave --model out for an estimate")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
