"""The plots of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrad_vllm.load.comparison import CONTENDERS
from regrad_vllm.load.figures import itl_ms, ttft_ms
from regrad_vllm.load.results import Results
from regrad_vllm.load.results_tables import memory_bytes
from regrad_vllm.reporting.intervals import Spread
from regrad_vllm.reporting.plots import bare, new_figure, svg

_COLOURS: Mapping[str, str] = {
    "base": "#8a93a6", "learner": "#5b6478", "rag": "#e0a458", "rag_learner": "#c9703f", "rag_sentence": "#b39b1f",
    "ft_rag_sentence": "#8c5a2b",
    "regrad": "#0b6e4f", "regrad_cue": "#4f9fc0", "regrad_icl": "#3aa17e", "peft_folder": "#7b5ea7",
    "published": "#b8567a",
}  # fmt: skip
_LEAST_ITL_MS = 5.0  # the plot starts here; a smaller ITL means that two tokens came together


def throughput(results: Results) -> str:
    """Latency against throughput. Each contender has a line, with a point for each number of requests at a time."""
    figure, (left, right) = new_figure(11, 4.2, 1, 2)
    for axes, what in ((left, "ttft_ms"), (right, "e2el_ms")):
        for name in CONTENDERS:
            points = [
                (group.condition.arrival.value, group.figures[name])
                for group in results.curve  # by arrival
                if group.condition.arrival.kind == "closed"
                and name in group.figures
                and getattr(group.figures[name], what)
            ]
            if points:
                xs = [found.requests_s.median for _, found in points]
                ys = [getattr(found, what)[50] for _, found in points]
                axes.plot(xs, ys, marker="o", ms=4, color=_COLOURS[name], label=CONTENDERS[name].label)
                for x, y, (value, _) in zip(xs, ys, points, strict=True):
                    axes.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(4, 3), fontsize=8)
        axes.set_xlabel("completed requests/s")
        axes.set_ylabel(f"{what[:-3].upper()} p50, ms")
        axes.set_ylim(bottom=0)
        bare(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return svg(figure)


def distributions(results: Results) -> str:
    """Distributions of TTFT and ITL in the main comparison: the share of values up to each time."""
    figure, (left, right) = new_figure(11, 4.2, 1, 2)
    for name, own in results.main_completed.items():
        _ecdf(left, [ttft_ms(line) for line in own], name)
        _ecdf(right, [gap for line in own for gap in itl_ms(line)], name)
    left.set_xlabel("TTFT, ms")
    left.set_xlim(left=0)
    right.set_xlabel("ITL, ms")
    right.set_xscale("log")
    right.set_xlim(left=_LEAST_ITL_MS)
    for axes in (left, right):
        axes.set_ylabel("share at most so long")
        bare(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return svg(figure)


def memory(results: Results) -> str:
    """Megabytes of KV cache and LoRA slot for one request alone. Documents are shared, so they don't count."""
    figure, axes = new_figure(8.5, 3.2)
    found = results.main.figures
    labels = [CONTENDERS[name].label for name in found]
    sizes = [memory_bytes(results, name, own) for name, own in found.items()]
    kv = [size / 1e6 for size, _ in sizes]
    axes.barh(labels, kv, color="#c9703f", label="KV cache, whole blocks, none shared")
    axes.barh(labels, [size / 1e6 for _, size in sizes], left=kv, color="#0b6e4f", label="LoRA slot")
    axes.invert_yaxis()
    axes.set_xlabel("MB a running request")
    axes.legend(fontsize=8, frameon=False)
    bare(axes)
    return svg(figure)


def quality(results: Results) -> str:
    """F1 against requests/s."""
    figure, axes = new_figure(8.5, 4)
    for name, found in results.quality.items():
        if name not in results.main.figures:
            continue
        cost = results.main.figures[name].requests_s
        mean = 100 * found.f1.mean
        axes.errorbar(
            [cost.median], [mean], fmt="o", color=_COLOURS[name], capsize=2, label=CONTENDERS[name].label,
            xerr=[[cost.median - cost.low], [cost.high - cost.median]],
            yerr=[[mean - 100 * found.f1.low], [100 * found.f1.high - mean]],
        )  # fmt: skip
    axes.set_xlabel("requests/s, output length fixed")
    axes.set_ylabel("F1, %, output length free")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    bare(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    return svg(figure)


def growth(results: Results) -> str:
    """Seconds per request against the tokens of its documents, with the fitted line."""
    figure, axes = new_figure(8.5, 4)
    slopes = results.slopes()
    for name, points in results.growth().items():
        xs = [x for x, _ in points]
        taken = [Spread.of([1 / rate for rate in rates.values()]) for _, rates in points]
        ys = [own.median for own in taken]
        below, above = [own.median - own.low for own in taken], [own.high - own.median for own in taken]
        label = CONTENDERS[name].label
        if name in slopes:
            intercept, slope = slopes[name].request.median, slopes[name].token.median
            label += f": {1e6 * slope:.0f} µs a token"
            axes.plot([min(xs), max(xs)], [intercept + slope * x for x in (min(xs), max(xs))], color=_COLOURS[name])
        axes.errorbar(xs, ys, yerr=[below, above], fmt="o", ms=4, capsize=2, color=_COLOURS[name], label=label)
    axes.set_xlabel("tokens of the k documents")
    axes.set_ylabel("seconds a request (1 / requests/s)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    bare(axes)
    return svg(figure)


def _ecdf(axes: Any, values: Sequence[float], name: str) -> None:
    if values:
        ordered = sorted(values)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        axes.step(ordered, shares, where="post", color=_COLOURS[name], linewidth=1.3, label=CONTENDERS[name].label)
