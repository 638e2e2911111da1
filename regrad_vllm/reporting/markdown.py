"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """The first ``num_left`` columns are aligned to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|---" * num_left + "|--:" * (len(head) - num_left) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
