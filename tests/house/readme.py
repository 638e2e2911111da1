"""Reads the README's examples: code blocks that a ``<!-- test: name -->`` comment stands above."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
_EXAMPLE = re.compile(r"<!-- test: (\w+) -->\n```(\w+)\n(.*?)```", re.DOTALL)
_BLOCK = re.compile(r"^```(\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Example:
    language: str  # "sh" or "python"
    code: str


def examples() -> dict[str, Example]:
    return {name: Example(language, code) for name, language, code in _EXAMPLE.findall(README.read_text("utf-8"))}


def num_code_blocks() -> int:
    return len(_BLOCK.findall(README.read_text("utf-8")))
