"""The report: tables in Markdown, and one HTML page with plots. Brackets hold 95% intervals."""

from __future__ import annotations

import html
from collections.abc import Mapping
from string import Template
from typing import Any

from regrad_vllm.evaluate.methods import METHODS
from regrad_vllm.evaluate.summary import Report
from regrad_vllm.reporting.intervals import Interval
from regrad_vllm.reporting.markdown import markdown_table
from regrad_vllm.reporting.page import facts_table, html_table, page
from regrad_vllm.reporting.plots import bare, new_figure, svg

_BODY = Template("""
<p>$questions questions of $sets sets, $documents documents in the bank. F1 in percent (accuracy for yes/no questions);
brackets and bars are bootstrap 95% intervals; unanswered questions count as wrong.</p>
<h2>All sets</h2>$overall_plot
<h2>Set by set</h2>$sets_plot
$sets_table
<h2>Paired differences of F1</h2>$differences_plot
$differences_table
<h2>How it was made</h2>$facts
""")
_COLOURS = {"regrad": "#0b6e4f", "regrad_icl": "#3aa17e", "regrad_gold": "#86cbb2"}
_OTHER, _CONTROL = "#8a93a6", "#c9703f"


def markdown(report: Report) -> str:
    """Three tables: all sets together, each set, and the differences."""
    return "\n\n".join((overall_table(report), sets_table(report), comparisons_table(report)))


def overall_table(report: Report) -> str:
    head = ["method", f"F1, mean of {len(report.sets)} sets, {report.num_questions} questions"]
    return markdown_table(head, [[METHODS[name].label, found.percent()] for name, found in report.overall.items()])


def sets_table(report: Report) -> str:
    with_nll = any(row.answer_nll is not None for entry in report.sets for row in entry.rows.values())
    head = ["set (questions; document retrieved)", "method", "EM", "F1 or accuracy", "failed"]
    rows = []
    for entry in report.sets:
        label = f"{entry.name} ({entry.num_questions}; {entry.recall:.0%})"
        for method, row in entry.rows.items():
            nll = ["–" if row.answer_nll is None else _nats(row.answer_nll)] * with_nll
            rows.append([label, method, row.em.percent(), row.f1.percent(), str(row.failed), *nll])
    return markdown_table([*head, *["answer NLL"] * with_nll], rows, num_left=2)


def comparisons_table(report: Report) -> str:
    names = [entry.name for entry in report.sets]
    return markdown_table(["F1 difference, paired", "mean", *names], _difference_rows(report))


def _difference_rows(report: Report) -> list[list[str]]:
    """A row for each comparison: its name, the mean over the sets, each set."""
    return [
        [f"{c.method} − {c.other}", c.difference.percent(), *(c.by_set[entry.name].percent() for entry in report.sets)]
        for c in report.comparisons
    ]


def render(report: Report, facts: Mapping[str, object]) -> str:
    """The HTML page. ``facts``: name → value, shown so that a reader can repeat the run."""
    names = [entry.name for entry in report.sets]
    sets_rows = []
    for method in report.methods:
        by_set = [entry.rows[method].f1.percent() for entry in report.sets]
        sets_rows.append([METHODS[method].label, report.overall[method].percent(), *by_set])
    headings = [f"{entry.name} ({entry.num_questions}; retrieved {entry.recall:.0%})" for entry in report.sets]
    body = _BODY.substitute(
        questions=report.num_questions,
        sets=len(names),
        documents=html.escape(str(facts.get("documents", ""))),
        overall_plot=_bars({METHODS[name].label: found for name, found in report.overall.items()}, report.methods),
        sets_plot=_grid(report),
        sets_table=html_table(["F1", "mean of the sets", *headings], sets_rows),
        differences_plot=_bars({f"{c.method} − {c.other}": c.difference for c in report.comparisons}, ()),
        differences_table=html_table(["", "mean of the sets", *names], _difference_rows(report)),
        facts=facts_table(facts),
    )
    return page("ReGrad evaluation", body)


def _bars(intervals: Mapping[str, Interval], methods: tuple[str, ...]) -> str:
    figure, axes = new_figure(8, 0.42 * len(intervals) + 0.8)
    _draw(axes, intervals, [_colour(method) for method in methods] or [_OTHER] * len(intervals))
    axes.set_xlabel("F1, %" if methods else "difference of F1, points")
    return svg(figure)


def _grid(report: Report) -> str:
    columns = min(3, len(report.sets))
    rows = -(-len(report.sets) // columns)
    height = (0.3 * len(report.methods) + 0.9) * rows
    figure, grid = new_figure(4.2 * columns, height, rows, columns, sharey=True, squeeze=False)
    for axes, entry in zip(grid.flat, report.sets, strict=False):
        _draw(axes, {m: entry.rows[m].f1 for m in report.methods}, [_colour(m) for m in report.methods])
        axes.set_title(entry.name, fontsize=10)
    for axes in list(grid.flat)[len(report.sets) :]:
        axes.set_visible(False)
    return svg(figure)


def _draw(axes: Any, intervals: Mapping[str, Interval], colours: list[str]) -> None:
    means = [100 * found.mean for found in intervals.values()]
    below = [100 * (found.mean - found.low) for found in intervals.values()]
    above = [100 * (found.high - found.mean) for found in intervals.values()]
    axes.barh(list(intervals), means, color=colours, xerr=[below, above], ecolor="#33363d", capsize=2, height=0.7)
    axes.invert_yaxis()
    axes.axvline(0, color="#33363d", linewidth=0.8)
    bare(axes, "x")


def _colour(method: str) -> str:
    if method in ("regrad_wrong", "regrad_random"):
        return _CONTROL
    return _COLOURS.get(method, _OTHER)


def _nats(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
