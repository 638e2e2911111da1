"""Long texts → passages of about 160 tokens, cut where a paragraph or a sentence ends, titled by their heading.

Training, `regrad ingest` and the evaluation all cut texts here, so a learner meets the passages that it was trained on.
The lines of an ingested .jsonl file are passages already. Tokens are estimated, because `regrad ingest` has a tokenizer
only if it is named one.

A passage begins with the last sentences of the passage before it, up to OVERLAP_TOKENS. So it also holds the sentences
that its own first sentence refers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from bank_service.values.sentences import CLEAR_STOPS, CLOSERS, STOPS, WIDE_STOPS, split_sentences
from bank_service.wire.limits import MAX_TITLE_BYTES
from regrad_vllm.data.token_counts import CountTokens, count_tokens

TARGET_TOKENS = 160
# A passage may grow to this before it is closed, so that a paragraph's last sentence isn't left alone.
MAX_PASSAGE_TOKENS = 200
OVERLAP_TOKENS = 32
_MIN_TOKENS = 40
_TITLE_TOKENS = 16  # a longer title takes its tokens from those of the text
_MAX_HEADING_WORDS, _MAX_HEADING_CHARACTERS, _MAX_HEADING_UNSPACED = 12, 120, 24
_PAUSES = ":;,：；，、،؛፣፤፥၊"
# Scripts without spaces: from Thai to Burmese, Khmer, Japanese, Chinese. Korean has spaces, but says as much in a few
# characters.
_UNSPACED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Passage:
    title: str  # the headings above it; "" without any
    text: str


class _Piece(NamedTuple):
    """A paragraph, a sentence or a part of one."""

    separator: str  # from the piece before it
    text: str
    num_tokens: int


def split_markdown(text: str, count: CountTokens = count_tokens) -> list[Passage]:
    """The passages of a Markdown text. A passage never crosses a heading."""
    sections = _markdown_sections(_unified(text))
    return [passage for title, body in sections for passage in _split_section(title, body, count)]


def split_plain(text: str, count: CountTokens = count_tokens) -> list[Passage]:
    """The passages of a plain text. The first line is the heading if it stands alone and is short, and no sentence."""
    head, _, rest = _unified(text).strip().partition("\n")
    heading = head.strip()
    alone = rest.lstrip(" \t").startswith("\n")
    if rest.strip() and alone and _may_be_heading(heading):
        return _split_section(heading, rest, count)
    return _split_section("", text, count)


def _may_be_heading(line: str) -> bool:
    is_short = (
        len(line.split()) <= _MAX_HEADING_WORDS
        and len(line) <= _MAX_HEADING_CHARACTERS
        and len(_UNSPACED.findall(line)) <= _MAX_HEADING_UNSPACED
    )
    return is_short and not line.rstrip(CLOSERS).endswith(tuple(STOPS + CLEAR_STOPS + WIDE_STOPS + _PAUSES))


def split_text(title: str, text: str) -> list[Passage]:
    """The passages of a text with a known title. A short text is one passage, unchanged."""
    if count_tokens(text) <= MAX_PASSAGE_TOKENS:
        return [Passage(title, text)]
    return _split_section(title, text, count_tokens)


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
        if heading.type == "heading_open" and heading.level == 0 and heading.map:
            yield _join_path(path), "\n".join(lines[start : heading.map[0]])
            level = len(heading.markup)
            path = [entry for entry in path if entry[0] < level]
            start = heading.map[0]
            if len(words.content.encode()) <= MAX_TITLE_BYTES:  # a longer one is text of its own section
                path.append((level, words.content))
                start = heading.map[1]
    yield _join_path(path), "\n".join(lines[start:])


def _join_path(path: list[tuple[int, str]]) -> str:
    """The headings, without the outer ones if they would be too long for a title together."""
    title = " / ".join(title for _, title in path if title)
    return title if len(title.encode()) <= MAX_TITLE_BYTES else _join_path(path[1:])


def _split_section(title: str, body: str, count: CountTokens) -> list[Passage]:
    target = max(_MIN_TOKENS, TARGET_TOKENS - max(0, count(title) - _TITLE_TOKENS))
    most = target + MAX_PASSAGE_TOKENS - TARGET_TOKENS
    passages: list[str] = []
    current: list[_Piece] = []
    num_repeated = 0  # pieces of current that the passage before it ends with
    for piece in _pieces(body, target, count):
        num_tokens = _num_tokens(current)
        if len(current) > num_repeated and (num_tokens >= target or num_tokens + piece.num_tokens > most):
            passages.append(_join(current))
            current = _tail(current)
            num_repeated = len(current)
        current.append(piece)
    new = current[num_repeated:]
    if passages and _num_tokens(new) < _MIN_TOKENS:
        passages[-1] += "".join(piece.separator + piece.text for piece in new)
    elif new:
        passages.append(_join(current))
    return [Passage(title, passage) for passage in passages]


def _num_tokens(pieces: list[_Piece]) -> int:
    return sum(piece.num_tokens for piece in pieces)


def _join(pieces: list[_Piece]) -> str:
    return "".join(piece.separator + piece.text for piece in pieces)[len(pieces[0].separator) :]


def _tail(pieces: list[_Piece]) -> list[_Piece]:
    """The last pieces that fit into the overlap, but never all pieces."""
    total = 0
    for index in range(len(pieces) - 1, 0, -1):
        total += pieces[index].num_tokens
        if total > OVERLAP_TOKENS:
            return pieces[index + 1 :]
    return pieces[1:]


def _pieces(body: str, limit: int, count: CountTokens) -> Iterator[_Piece]:
    """Whole paragraphs, or the sentences of paragraphs that are longer than the limit."""
    for paragraph in re.split(r"\n[ \t]*\n", _unified(body)):
        stripped, separator = paragraph.strip(), "\n\n"
        if not stripped:
            continue
        num_tokens = count(stripped)
        if num_tokens <= limit:
            yield _Piece(separator, stripped, num_tokens)
            continue
        for sentence in split_sentences(stripped):
            for part, num_tokens in _parts(sentence, limit, count):
                yield _Piece(separator, part, num_tokens)
                separator = " "


def _parts(sentence: str, limit: int, count: CountTokens) -> Iterator[tuple[str, int]]:
    """The sentence and its tokens; if it is too long, those of its parts.

    They are cut between words or, in scripts without spaces, between characters.
    """
    num_tokens = count(sentence)
    if num_tokens <= limit:
        yield sentence, num_tokens
        return
    words = sentence.split()
    units, space = (words, " ") if len(words) > 1 else (list(sentence), "")
    size = max(1, len(units) * limit // num_tokens)
    for start in range(0, len(units), size):
        yield from _parts(space.join(units[start : start + size]).strip(), limit, count)
