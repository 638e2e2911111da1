"""Results as one self-contained HTML page."""

from __future__ import annotations

import html

from regrad_vllm.load import plots, tables
from regrad_vllm.load.figures import __doc__ as FORMULAS
from regrad_vllm.load.results import Results
from regrad_vllm.web_page import facts_table, page, table


def render(results: Results) -> str:
    parts = [_summary(results)]
    for group in results.of("cost"):
        parts += [
            f"<h2>{html.escape(tables.describe(group))}</h2>",
            table(*tables.cost_table(results, group), wide=True),
        ]
        if group is results.main:
            parts += [plots.distributions(results)]
        if group.reuse is not None:
            parts.append(f'<p class="note">{html.escape(tables.reuse_sentence(group))}</p>')
    if results.of("curve"):
        parts += [
            "<h2>Throughput against latency</h2>",
            plots.throughput(results),
            table(*tables.curve_table(results), wide=True),
        ]
    if results.of("growth"):
        parts += [
            "<h2>As k and documents grow</h2>",
            plots.growth(results),
            table(*tables.growth_table(results), wide=True),
        ]
    if results.quality:
        parts += ["<h2>Quality and cost</h2>", plots.quality(results), table(*tables.quality_table(results), wide=True)]
    parts += [
        "<h2>What a request holds</h2>",
        plots.memory(results),
        table(*tables.memory_table(results, results.main), wide=True),
    ]
    parts += ["<h2>Where the time goes</h2>", table(*tables.stages_table(results.main), wide=True)]
    parts += ["<h2>Before the first request</h2>", table(*tables.offline_table(results), wide=True)]
    parts += ["<h2>What the words mean</h2>", f"<pre>{html.escape(str(FORMULAS))}</pre>"]
    parts += ["<h2>How it was made</h2>", facts_table(results.run["facts"])]
    return page("ReGrad and its rivals under load", "\n".join(parts))


def _summary(results: Results) -> str:
    return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in tables.summary(results))
