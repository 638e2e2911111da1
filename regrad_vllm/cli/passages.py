"""Long texts → passages of about 120 words, cut where a paragraph or a sentence ends, titled by their heading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

TARGET_WORDS = 120
# A passage may grow to this before it is closed, so that a paragraph's last sentence isn't left alone.
_MAX_WORDS = 150
_MIN_WORDS = 30
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？]")
# Scripts without spaces: so many characters count as one word.
_CHARACTERS_PER_WORD = 10


@dataclass(frozen=True, slots=True)
class Passage:
    title: str  # the headings above it, "" where there are none
    text: str


def split_markdown(text: str) -> list[Passage]:
    """Passages of a Markdown text; none crosses a heading."""
    return [passage for title, body in _markdown_sections(text) for passage in _split_section(title, body)]


def split_plain(text: str) -> list[Passage]:
    """Passages of a plain text. A short first line that stands alone and doesn't end like a sentence is its heading."""
    head, _, rest = text.strip().partition("\n")
    heading = head.strip()
    alone = rest.startswith("\n") or rest.lstrip(" \t\r").startswith("\n")
    if rest.strip() and alone and len(heading.split()) <= 12 and not heading.endswith((".", "!", "?", ":", ";", ",")):
        return _split_section(heading, rest)
    return _split_section("", text)


def _markdown_sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, body) per heading; the title joins the headings above with " / "."""
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if heading is None:
            lines.append(line)
            continue
        yield _join_path(path), "\n".join(lines)
        lines = []
        level = len(heading[1])
        path = [entry for entry in path if entry[0] < level] + [(level, heading[2])]
    yield _join_path(path), "\n".join(lines)


def _join_path(path: list[tuple[int, str]]) -> str:
    return " / ".join(title for _, title in path if title)


def _count_words(text: str) -> int:
    return max(len(text.split()), len(text) // _CHARACTERS_PER_WORD)


def _split_section(title: str, body: str) -> list[Passage]:
    passages: list[str] = []
    current, num_words = "", 0
    for separator, piece in _pieces(body):
        words = _count_words(piece)
        if current and (num_words >= TARGET_WORDS or num_words + words > _MAX_WORDS):
            passages.append(current)
            current, num_words = "", 0
        current = current + separator + piece if current else piece
        num_words += words
    if passages and 0 < num_words < _MIN_WORDS:
        passages[-1] += "\n\n" + current
    elif current:
        passages.append(current)
    return [Passage(title, passage) for passage in passages]


def _pieces(body: str) -> Iterator[tuple[str, str]]:
    """(separator before it, piece): whole paragraphs, or the sentences of paragraphs that are too long."""
    for paragraph in re.split(r"\n[ \t]*\n", body.replace("\r\n", "\n")):
        stripped = paragraph.strip()
        if not stripped:
            continue
        if _count_words(stripped) <= TARGET_WORDS:
            yield "\n\n", stripped
            continue
        separator = "\n\n"
        for sentence in _sentences(stripped):
            for piece in _bounded(sentence):
                yield separator, piece
                separator = " "


def _sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        yield paragraph[start : end.end()].strip()
        start = end.end()
    if paragraph[start:].strip():
        yield paragraph[start:].strip()


def _bounded(sentence: str) -> Iterator[str]:
    """The sentence, cut between words (or characters, in scripts without spaces) where it is too long."""
    if _count_words(sentence) <= TARGET_WORDS:
        yield sentence
        return
    words = sentence.split()
    if len(words) > len(sentence) // _CHARACTERS_PER_WORD:
        for start in range(0, len(words), TARGET_WORDS):
            yield " ".join(words[start : start + TARGET_WORDS])
        return
    size = TARGET_WORDS * _CHARACTERS_PER_WORD
    for start in range(0, len(sentence), size):
        if sentence[start : start + size].strip():
            yield sentence[start : start + size].strip()
