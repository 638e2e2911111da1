"""Writes the report of a run's folder: report.json, report.md, and report.html, one page."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path

from regrad_vllm.load import results_plots as plots
from regrad_vllm.load import results_tables as tables
from regrad_vllm.load.figures import __doc__ as FORMULAS
from regrad_vllm.load.results import Results, load
from regrad_vllm.reporting.page import facts_table, html_table, page
from regrad_vllm.reporting.run_folder import write_json


def write_report(folder: Path) -> int:
    """Writes the report. Returns 0, or 1 if a request failed or was stopped. FileNotFoundError, ValueError."""
    results = load(folder)
    text = tables.markdown(results)
    write_json(folder / "report.json", results.plain())
    (folder / "report.md").write_text(text, "utf-8")
    (folder / "report.html").write_text(render(results), "utf-8")
    failed = [found for group in results.groups for found in group.figures.values() if found.failed + found.incomplete]
    if failed:
        number = sum(found.failed + found.incomplete for found in failed)
        sys.stdout.write(f"{number} requests failed or were stopped; the first: {failed[0].first_error}\n")
    sys.stdout.write(f"{text}\nevery request, tables and plots: {folder}\n{json.dumps(results.last_line())}\n")
    return int(bool(failed))


def render(results: Results) -> str:
    parts = [_summary(results)]
    for group in results.of("cost"):
        parts += [
            f"<h2>{html.escape(tables.describe(group))}</h2>",
            html_table(*tables.cost_table(results, group), wide=True),
        ]
        if group is results.main:
            parts += [plots.distributions(results)]
        if group.reuse is not None:
            parts.append(f'<p class="note">{html.escape(tables.reuse_sentence(group))}</p>')
    if results.of("curve"):
        parts += [
            "<h2>Throughput against latency</h2>",
            plots.throughput(results),
            html_table(*tables.curve_table(results), wide=True),
        ]
    if results.of("growth"):
        parts += [
            "<h2>As k and documents grow</h2>",
            plots.growth(results),
            html_table(*tables.growth_table(results), wide=True),
        ]
    if results.quality:
        parts += [
            "<h2>Quality and cost</h2>",
            plots.quality(results),
            html_table(*tables.quality_table(results), wide=True),
        ]
    parts += [
        "<h2>What a request holds</h2>",
        plots.memory(results),
        html_table(*tables.memory_table(results, results.main), wide=True),
    ]
    parts += ["<h2>Where the time goes</h2>", html_table(*tables.stages_table(results.main), wide=True)]
    parts += ["<h2>Before the first request</h2>", html_table(*tables.offline_table(results), wide=True)]
    parts += ["<h2>What the words mean</h2>", f"<pre>{html.escape(str(FORMULAS))}</pre>"]
    parts += ["<h2>How it was made</h2>", facts_table(results.run["facts"])]
    return page("ReGrad and its rivals under load", "\n".join(parts))


def _summary(results: Results) -> str:
    return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in tables.summary(results))
