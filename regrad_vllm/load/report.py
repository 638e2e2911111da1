"""Writes the report of a run's folder: report.json, report.md, report.html; prints the tables and the last line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from regrad_vllm.load.page import render
from regrad_vllm.load.results import load
from regrad_vllm.load.tables import markdown


def write_report(folder: Path) -> int:
    """0, or 1 where a request failed or was stopped. FileNotFoundError, ValueError."""
    results = load(folder)
    text = markdown(results)
    (folder / "report.json").write_text(json.dumps(results.plain(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "report.md").write_text(text, "utf-8")
    (folder / "report.html").write_text(render(results), "utf-8")
    failed = [found for group in results.groups for found in group.figures.values() if found.failed + found.incomplete]
    if failed:
        number = sum(found.failed + found.incomplete for found in failed)
        sys.stdout.write(f"{number} requests failed or were stopped; the first: {failed[0].first_error}\n")
    sys.stdout.write(f"{text}\nevery request, tables and plots: {folder}\n{json.dumps(results.last_line())}\n")
    return int(bool(failed))
