"""Takes a page apart: its sentences, its links, the headings that links can lead to, and the code in its lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
_ITEM = re.compile(r"^(?:[-*]|\d+\.) ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class Page:
    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text("utf-8"))

    def sentences(self) -> Iterator[str]:
        """The sentences of paragraphs and list items: no code, tables and headings."""
        for paragraph in self._paragraphs():
            plain = _LINK.sub(r"\1", _CODE.sub("CODE", paragraph))
            yield from filter(None, _SENTENCE_END.split(plain.strip()))

    def links(self) -> list[str]:
        """Targets of links and pictures, as they are written."""
        return [target for _, target in _LINK.findall(self._without_code())]

    def anchors(self) -> set[str]:
        """The names of the headings in links, made as GitHub makes them."""
        seen: Counter[str] = Counter()
        found = set()
        for heading in re.findall(r"^#+ (.+)$", _FENCED.sub("", self.text), re.MULTILINE):
            plain = _LINK.sub(r"\1", heading).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        return found

    def code(self) -> Iterator[str]:
        """The code in lines, and each line of code blocks with its continuations."""
        text = _COMMENT.sub("", self.text)
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield from block.replace("\\\n", " ").splitlines()
        text = _FENCED.sub("", text)
        indented = "\n".join(re.findall(r"^    (.+)$", text, re.MULTILINE))
        yield from indented.replace("\\\n", " ").splitlines()
        yield from (" ".join(code.split()) for code in _CODE.findall(text))

    def _paragraphs(self) -> Iterator[str]:
        lines: list[str] = []
        for line in [*self._without_code().splitlines(), ""]:
            starts = bool(_ITEM.match(line.lstrip()))
            ends = not line.strip() or line.startswith(("|", "#", "    "))
            if (starts or ends) and lines:
                yield " ".join(lines)
                lines = []
            if not ends:
                lines.append(_ITEM.sub("", line.strip()))

    def _without_code(self) -> str:
        return _FENCED.sub("", _COMMENT.sub("", self.text))


def num_words(sentence: str) -> int:
    """Words and numbers; signs alone don't count."""
    return sum(bool(_WORD.search(word)) for word in sentence.split())
