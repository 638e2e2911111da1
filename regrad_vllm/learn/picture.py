"""Plots a run's log: the outer loss by set, and the results of the validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

SMOOTHING = 0.05  # the weight of a new value in the moving mean


def draw(log: Path, out: Path) -> None:
    """Reads the JSON Lines of a training log and writes an SVG."""
    from matplotlib.figure import Figure

    from regrad_vllm.reporting.plots import save_svg

    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    losses: dict[str, list[tuple[int, float]]] = {}
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if "loss" in line:
            losses.setdefault(line["set"], []).append((line["step"], line["loss"]))
        elif "validation" in line:
            found.setdefault(line["validation"], []).append((line["step"], line["regrad"]))
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in losses.items():
        left.plot([step for step, _ in points], _smooth([value for _, value in points]), label=name, linewidth=1.4)
    left.set_xlabel("step")
    left.set_ylabel("outer loss, moving mean")
    for name, points in found.items():
        style = "--" if name.endswith("k=3") else "-"
        right.plot([step for step, _ in points], [value for _, value in points], style, marker="o", ms=3, label=name)
    right.set_xlabel("step")
    right.set_ylabel("validation: answer tokens right, teacher forcing")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.grid(color="#e3e3e8")
        if axes.lines:
            axes.legend(fontsize=8)
    save_svg(figure, out)


def _smooth(values: Sequence[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else (1 - SMOOTHING) * smooth[-1] + SMOOTHING * value)
    return smooth
