"""matplotlib figures as SVG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, Literal


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes. ``options`` go to matplotlib's ``subplots``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save_svg(figure: Any, out: Path | IO[str], *, fonttype: Literal["path", "none"] = "path") -> None:
    """Writes a figure. Equal figures give equal bytes. ``fonttype`` "none" keeps text as text."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "regrad", "svg.fonttype": fonttype}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def svg(figure: Any) -> str:
    """A matplotlib figure as an <svg> element; its text stays text."""
    out = io.StringIO()
    save_svg(figure, out, fonttype="none")
    return out.getvalue()[out.getvalue().index("<svg") :]


def bare(axes: Any, grid: Literal["both", "x"] = "both") -> None:
    """A grid, and no frame above and to the right."""
    axes.grid(axis=grid, color="#e3e3e8")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
