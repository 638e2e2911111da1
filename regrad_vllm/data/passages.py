"""Long texts → passages of about 160 tokens, cut where a paragraph or a sentence ends, titled by their heading.

Training, `regrad ingest` and the evaluation all cut texts here, so a learner meets the passages that it was trained on.
The lines of an ingested .jsonl file are passages already. Tokens are estimated from words, because `regrad ingest` has
no tokenizer.

A passage begins with the last sentences of the passage before it, up to OVERLAP_TOKENS. So it also holds the sentences
that its own first sentence refers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from bank_service.wire.limits import MAX_TITLE_BYTES

TOKENS_PER_WORD = 1.35  # of English text, with the tokenizers of today's models
TARGET_TOKENS = 160
# A passage may grow to this before it is closed, so that a paragraph's last sentence isn't left alone.
MAX_PASSAGE_TOKENS = 200
OVERLAP_TOKENS = 32
_MIN_TOKENS = 40
_MAX_HEADING_WORDS, _MAX_HEADING_CHARACTERS, _MAX_HEADING_UNSPACED = 12, 120, 24
_STOPS = ".!?…"  # they end a sentence before white space
_CLEAR_STOPS = "。！？｡।॥؟۔։።៕။།"  # they end a sentence anywhere
_PAUSES = ":;,：；，、،؛፣፤፥၊"
_CLOSERS = "\"'”’»)]」』）】》"
_CLOSED = f"[{re.escape(_CLOSERS)}]*"
_SENTENCE_END = re.compile(rf"[{_STOPS}]{_CLOSED}\s+|[{_CLEAR_STOPS}]{_CLOSED}")
_LONGEST_TOKEN = 7  # characters; for text without spaces, such as URLs and rows of digits
# Scripts without spaces: from Thai to Burmese, Khmer, Japanese, Chinese, Korean. A character counts as a token.
_UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Passage:
    title: str  # the headings above it; "" without any
    text: str


def split_markdown(text: str) -> list[Passage]:
    """The passages of a Markdown text. A passage never crosses a heading."""
    return [passage for title, body in _markdown_sections(_unified(text)) for passage in _split_section(title, body)]


def split_plain(text: str) -> list[Passage]:
    """The passages of a plain text. The first line is the heading if it stands alone and is short, and no sentence."""
    head, _, rest = _unified(text).strip().partition("\n")
    heading = head.strip()
    alone = rest.lstrip(" \t").startswith("\n")
    if rest.strip() and alone and _may_be_heading(heading):
        return _split_section(heading, rest)
    return _split_section("", text)


def _may_be_heading(line: str) -> bool:
    is_short = (
        len(line.split()) <= _MAX_HEADING_WORDS
        and len(line) <= _MAX_HEADING_CHARACTERS
        and len(_UNSPACED.findall(line)) <= _MAX_HEADING_UNSPACED
    )
    return is_short and not line.rstrip(_CLOSERS).endswith(tuple(_STOPS + _CLEAR_STOPS + _PAUSES))


def split_text(title: str, text: str) -> list[Passage]:
    """The passages of a text with a known title. A short text is one passage, unchanged."""
    if count_tokens(text) <= MAX_PASSAGE_TOKENS:
        return [Passage(title, text)]
    return _split_section(title, text)


def count_tokens(text: str) -> int:
    """The estimated number of tokens, from words and characters."""
    spaced = max(round(TOKENS_PER_WORD * len(text.split())), len(text) // _LONGEST_TOKEN)
    return max(spaced, len(_UNSPACED.findall(text)))


def _unified(text: str) -> str:
    """The text with newlines for other line ends, and with spaces for the form feeds between pages."""
    return re.sub(r"\r\n|[\r\v]", "\n", text).replace("\f", " ")


def _markdown_sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, body) per heading; the title joins the headings above with " / "."""
    from markdown_it import MarkdownIt  # here, since it is slow to load

    # Underlined headings are off, because they would take the metadata that many files begin with for a heading.
    parser = MarkdownIt("commonmark").disable(["lheading", "inline", "text_join"])
    tokens = parser.parse(text)
    lines = text.split("\n")
    path: list[tuple[int, str]] = []
    start = 0
    for heading, words in pairwise(tokens):
        is_heading = heading.type == "heading_open" and heading.level == 0
        if is_heading and heading.map and len(words.content.encode()) <= MAX_TITLE_BYTES:
            yield _join_path(path), "\n".join(lines[start : heading.map[0]])
            start = heading.map[1]
            level = len(heading.markup)
            path = [entry for entry in path if entry[0] < level] + [(level, words.content)]
    yield _join_path(path), "\n".join(lines[start:])


def _join_path(path: list[tuple[int, str]]) -> str:
    """The headings, without the outer ones if they would be too long for a title together."""
    title = " / ".join(title for _, title in path if title)
    return title if len(title.encode()) <= MAX_TITLE_BYTES else _join_path(path[1:])


def _split_section(title: str, body: str) -> list[Passage]:
    passages: list[str] = []
    current: list[tuple[str, str]] = []  # (separator before it, piece)
    num_tokens = num_new = 0  # num_new: tokens in current that aren't repeated from the passage before
    for separator, piece in _pieces(body):
        tokens = count_tokens(piece)
        if num_new and (num_tokens >= TARGET_TOKENS or num_tokens + tokens > MAX_PASSAGE_TOKENS):
            passages.append(_join(current))
            current = _tail(current)
            num_tokens, num_new = sum(count_tokens(text) for _, text in current), 0
        current.append((separator, piece))
        num_tokens += tokens
        num_new += tokens
    if passages and 0 < num_new < _MIN_TOKENS:
        passages[-1] += "".join(separator + piece for separator, piece in current[-_num_new_pieces(current, num_new) :])
    elif num_new:
        passages.append(_join(current))
    return [Passage(title, passage) for passage in passages]


def _join(pieces: list[tuple[str, str]]) -> str:
    return "".join(separator + piece for separator, piece in pieces)[len(pieces[0][0]) :]


def _tail(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The last pieces that fit into the overlap, but never all pieces."""
    total = 0
    for index in range(len(pieces) - 1, 0, -1):
        total += count_tokens(pieces[index][1])
        if total > OVERLAP_TOKENS:
            return pieces[index + 1 :]
    return pieces[1:]


def _num_new_pieces(pieces: list[tuple[str, str]], num_new: int) -> int:
    """The number of pieces at the end that have ``num_new`` tokens together."""
    number = 0
    while num_new > 0:
        number += 1
        num_new -= count_tokens(pieces[-number][1])
    return number


def _pieces(body: str) -> Iterator[tuple[str, str]]:
    """(separator before it, piece): whole paragraphs, or the sentences of paragraphs that are too long."""
    for paragraph in re.split(r"\n[ \t]*\n", _unified(body)):
        stripped = paragraph.strip()
        if not stripped:
            continue
        if count_tokens(stripped) <= TARGET_TOKENS:
            yield "\n\n", stripped
            continue
        separator = "\n\n"
        for sentence in split_sentences(stripped):
            for piece in _bounded(sentence):
                yield separator, piece
                separator = " "


def split_sentences(paragraph: str) -> Iterator[str]:
    """The paragraph's sentences in order."""
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        yield paragraph[start : end.end()].strip()
        start = end.end()
    if paragraph[start:].strip():
        yield paragraph[start:].strip()


def _bounded(sentence: str) -> Iterator[str]:
    """The sentence; if it is too long, its parts, cut between words or, in scripts without spaces, characters."""
    if count_tokens(sentence) <= TARGET_TOKENS:
        yield sentence
        return
    words = sentence.split()
    if count_tokens(sentence) == round(TOKENS_PER_WORD * len(words)):
        step = int(TARGET_TOKENS / TOKENS_PER_WORD)
        for start in range(0, len(words), step):
            yield " ".join(words[start : start + step])
        return
    size = len(sentence) * TARGET_TOKENS // count_tokens(sentence)
    for start in range(0, len(sentence), size):
        if sentence[start : start + size].strip():
            yield sentence[start : start + size].strip()
