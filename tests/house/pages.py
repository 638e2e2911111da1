"""Reads the documentation: the README, the pages of docs/, and the examples in them.

An example is a fenced code block. The comment ``<!-- test: name -->`` above it names the test that runs it.
The comment ``<!-- not run: reason -->`` says why no test runs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
_MARK = re.compile(r"<!-- (?:test: (\w+)|not run: .+) -->")
_BLOCK = re.compile(r"^(?:(<!-- [^\n]+ -->)\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Example:
    page: Path
    name: str  # empty where no test runs it
    language: str  # "sh", "python" or "js"
    code: str


def pages() -> tuple[Path, ...]:
    """The README first, then the pages of docs/ in order of name."""
    return (README, *sorted((ROOT / "docs").glob("*.md")))


def all_examples() -> list[Example]:
    """Every fenced block of every page. ValueError for a block without a mark."""
    found = []
    for page in pages():
        for comment, language, code in _BLOCK.findall(page.read_text("utf-8")):
            mark = _MARK.fullmatch(comment)
            if mark is None:
                name = page.relative_to(ROOT)
                raise ValueError(f"{name}: a block must be marked as run or not run, got {code[:60]!r}")
            found.append(Example(page, mark[1] or "", language, code))
    return found


def examples() -> dict[str, Example]:
    """The examples that tests run, by name."""
    return {example.name: example for example in all_examples() if example.name}
