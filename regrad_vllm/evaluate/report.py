"""Records → a table per set, and one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regrad_vllm.evaluate.asking import Record
from regrad_vllm.evaluate.metrics import Interval, bootstrap_interval


def summarise(records: Sequence[Record], methods: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """set → method → {"em", "f1": [mean, low, high], "questions", "failed"}; unanswered questions count as wrong."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(record.set_name for record in records):
        for method in methods:
            chosen = [record for record in records if record.set_name == name and record.method == method]
            summary.setdefault(name, {})[method] = {
                "em": _plain(bootstrap_interval([record.em for record in chosen])),
                "f1": _plain(bootstrap_interval([record.f1 for record in chosen])),
                "questions": len(chosen),
                "failed": sum(bool(record.error) for record in chosen),
            }
    return summary


def recall(records: Sequence[Record]) -> dict[str, float]:
    """set → share of its questions whose document was among the retrieved."""
    return {
        name: round(sum(r.gold_retrieved for r in records if r.set_name == name) / count, 4)
        for name in dict.fromkeys(record.set_name for record in records)
        if (count := sum(r.set_name == name for r in records))
    }


def markdown(summary: dict[str, dict[str, dict[str, Any]]], found: dict[str, float]) -> str:
    """One table: a row a method and set, EM and F1 in percent with 95% intervals."""
    lines = [
        "| set (questions; document retrieved) | method | EM | F1 | failed |",
        "|---|---|--:|--:|--:|",
    ]
    for name, methods in summary.items():
        for method, row in methods.items():
            label = f"{name} ({row['questions']}; {found[name]:.0%})"
            lines.append(f"| {label} | {method} | {_percent(row['em'])} | {_percent(row['f1'])} | {row['failed']} |")
    return "\n".join(lines)


def _plain(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.mean, interval.low, interval.high)]


def _percent(values: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
