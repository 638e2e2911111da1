"""A report as Markdown tables: percent, with 95% intervals in brackets."""

from __future__ import annotations

from regrad_vllm.evaluate.methods import METHODS
from regrad_vllm.evaluate.metrics import Interval
from regrad_vllm.evaluate.report import Report


def markdown(report: Report) -> str:
    """Three tables: all sets together, set by set, and the differences."""
    return "\n\n".join((overall_table(report), sets_table(report), comparisons_table(report)))


def overall_table(report: Report) -> str:
    lines = [f"| method | F1, mean of {len(report.sets)} sets, {report.num_questions} questions |", "|---|--:|"]
    lines += [f"| {METHODS[name].label} | {percent(interval)} |" for name, interval in report.overall.items()]
    return "\n".join(lines)


def sets_table(report: Report) -> str:
    with_nll = any(row.answer_nll is not None for entry in report.sets for row in entry.rows.values())
    lines = [
        f"| set (questions; document retrieved) | method | EM | F1 or accuracy | failed |{' answer NLL |' * with_nll}",
        f"|---|---|--:|--:|--:|{'--:|' * with_nll}",
    ]
    for entry in report.sets:
        for method, row in entry.rows.items():
            label = f"{entry.name} ({entry.num_questions}; {entry.recall:.0%})"
            nll = f" {_nats(row.answer_nll)} |" if row.answer_nll is not None else " – |" * with_nll
            lines.append(f"| {label} | {method} | {percent(row.em)} | {percent(row.f1)} | {row.failed} |{nll}")
    return "\n".join(lines)


def comparisons_table(report: Report) -> str:
    names = [entry.name for entry in report.sets]
    lines = [f"| F1 difference, paired | mean | {' | '.join(names)} |", "|---|--:|" + "--:|" * len(names)]
    for found in report.comparisons:
        cells = " | ".join(percent(found.by_set[name]) for name in names)
        lines.append(f"| {found.method} − {found.other} | {percent(found.difference)} | {cells} |")
    return "\n".join(lines)


def percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _nats(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
