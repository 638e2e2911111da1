"""Tables of text with columns of a fixed width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

WIDTH = 120


def render(widths: Sequence[int], rows: Sequence[Sequence[str]], max_lines: int = 3) -> Iterator[str]:
    """The lines of a table. Its first row is the head. Cells wrap, and a cell that doesn't fit ends with …."""
    rule = "-+-".join("-" * width for width in widths)
    for index, row in enumerate(rows):
        cells = [_wrap(cell, width, max_lines) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            yield " | ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        if index == 0:
            yield rule


def shorten(text: str, width: int) -> str:
    """The text, cut off if it is longer than ``width``."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(cell: str, width: int, max_lines: int) -> list[str]:
    lines: list[str] = []
    for part in cell.split("\n"):
        lines += textwrap.wrap(part, width, break_long_words=True) or [""]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], shorten(" ".join(lines[max_lines - 1 :]), width)]
    return lines
