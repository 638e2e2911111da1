"""Self-contained HTML pages. They fetch nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from string import Template

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #d8d8dc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } .note { color: #5a5a62; } .scroll { overflow-x: auto; }
.wide td { white-space: nowrap; }
</style></head><body>
<h1>$title</h1>
$body
</body></html>
""")


def page(title: str, body: str) -> str:
    """body: HTML."""
    return _PAGE.substitute(title=html.escape(title), body=body)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool = False) -> str:
    """wide: each cell in one line, however many columns there are."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "scroll wide" if wide else "scroll"
    return f'<div class="{kind}"><table><tr>{cells}</tr>{body}</table></div>'


def facts_table(facts: Mapping[str, object]) -> str:
    """Name → value, a row each."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
