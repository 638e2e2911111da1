"""N servers and M bank nodes, simulated and drawn: ``python -m benchmarks.scale_simulation --out FILE.svg``.

``scale_model.py`` has the model. For each way of routing and each rate it reports:

- the share of references that each level of caches has;
- the time from a request's arrival until its documents are in the worker, p50 and p99;
- the busy share of the busiest resource of each kind, and the requests/s at which it is full.

The machines and their times are flags. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_model import LEVELS, ROUTERS, Machines, Router, ServiceTimes, Simulation
from regrad_vllm.flags import add_flags, given
from regrad_vllm.reporting.machine import versions
from regrad_vllm.reporting.plots import bare, new_figure, save_svg

_ROUTER_COLOURS = dict(zip(ROUTERS, ("#8a8fa3", "#d98a2b", "#2f6db3"), strict=True))
_LEVEL_COLOURS = dict(zip(LEVELS, ("#1f4e79", "#5b9bd5", "#f0b65a", "#c0504d"), strict=True))
_LEVEL_NAMES = {"pool": "worker's pool", "arena": "arena", "redis": "Redis", "store": "object store"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[200, 600, 1000, 1150, 1250], help="requests/s")
    parser.add_argument("--requests", type=int, default=20_000, help="of each run (20000)")
    parser.add_argument("--before", type=int, default=100_000, help="requests that fill the caches (100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="SVG to write")
    add_flags(parser, Machines)
    for setting in asdict(ServiceTimes()):
        parser.add_argument(f"--{setting.replace('_', '-')}-ms", dest=setting, type=float, default=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    machines, times = Machines(**given(args, Machines)), ServiceTimes(**given(args, ServiceTimes))
    runs = [
        simulated(machines, times, router, rate, args.requests, args.before, args.seed)
        for router in ROUTERS
        for rate in args.rates
    ]
    caption = (
        f"Simulated: python -m benchmarks.scale_simulation, seed {args.seed}, {args.requests:,} requests a point, "
        + ", ".join(f"{name} {version}" for name, version in versions("simpy", "numpy").items())
    )
    if args.out is not None:
        draw(runs, machines, caption, args.out)
    sys.stdout.write(table(runs))
    figures = {"machines": asdict(machines), "times_ms": asdict(times), "runs": runs}
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


def simulated(
    machines: Machines, times: ServiceTimes, router: Router, rate: float, num_requests: int, num_before: int, seed: int
) -> dict[str, Any]:
    """The figures of one run."""
    outcome = Simulation(machines, times, router, seed).run(rate, num_requests, num_before)
    references = sum(outcome.levels.values())
    p50, p99 = np.percentile(outcome.resident_ms, [50, 99]).round(1).tolist()
    full_at = {kind: round(rate) for kind, rate in outcome.full_at().items()}
    return {
        "router": router,
        "requests_per_s": rate,
        "hits": {level: round(outcome.levels[level] / references, 4) for level in LEVELS},
        "resident_ms_p50": p50,
        "resident_ms_p99": p99,
        "busy": {kind: round(share, 3) for kind, share in outcome.utilisation().items()},
        "full_at": full_at,
        "first": min(full_at, key=full_at.__getitem__),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row for each run."""
    head = ["router", "requests/s", *_LEVEL_NAMES.values(), "resident, p50, p99", "first to be full, at requests/s"]
    lines = [head, ["---", *["--:"] * 6, "---"]]
    for run in runs:
        shares = [f"{run['hits'][level]:.0%}" for level in LEVELS]
        resident = f"{run['resident_ms_p50']:.0f}, {run['resident_ms_p99']:.0f} ms"
        first = f"{run['first']}, {run['full_at'][run['first']]:,}"
        lines.append([run["router"], f"{run['requests_per_s']:,.0f}", *shares, resident, first])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def draw(runs: Sequence[dict[str, Any]], machines: Machines, caption: str, out: Path) -> None:
    """Writes the plot: hits, times, and the rates at which resources are full."""
    figure, (hits, times, full) = new_figure(12, 4.2, 1, 3)
    by_router = {router: [run for run in runs if run["router"] == router] for router in ROUTERS}
    middle = {router: own[len(own) // 2] for router, own in by_router.items()}
    left = np.zeros(len(ROUTERS))
    for level in LEVELS:
        shares = np.array([100 * middle[router]["hits"][level] for router in ROUTERS])
        hits.barh(ROUTERS, shares, left=left, color=_LEVEL_COLOURS[level], label=_LEVEL_NAMES[level])
        for place, (start, share) in enumerate(zip(left, shares, strict=True)):
            if share >= 6:
                hits.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", color="white", fontsize=9)
        left += shares
    hits.set_title("Found at, % of references", fontsize=10)
    hits.set_xlabel(f"at {middle[ROUTERS[0]]['requests_per_s']:,.0f} requests/s", fontsize=9)
    hits.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.17), columnspacing=0.8, frameon=False)
    for router, own in by_router.items():
        rates = [run["requests_per_s"] for run in own]
        for key, line in (("resident_ms_p50", "-"), ("resident_ms_p99", "--")):
            label = router if line == "-" else None
            times.plot(rates, [run[key] for run in own], line, color=_ROUTER_COLOURS[router], marker=".", label=label)
    times.set_title("Documents in the worker after, ms", fontsize=10)
    times.set_xlabel("requests/s; p99 is dashed, p50 is not", fontsize=9)
    times.set_ylim(bottom=0)
    times.legend(fontsize=8, frameon=False)
    kinds = list(middle[ROUTERS[0]]["full_at"])
    for number, router in enumerate(ROUTERS):
        places = np.arange(len(kinds)) + 0.25 * (number - 1)
        values = [middle[router]["full_at"].get(kind, np.nan) for kind in kinds]
        full.plot(values, places, "o", color=_ROUTER_COLOURS[router])
        for place, value in zip(places, values, strict=True):
            full.text(1.15 * value, place, f"{value:,.0f}", va="center", fontsize=8)
    full.set_yticks(range(len(kinds)), kinds)
    full.set_xscale("log")
    full.set_xlim(right=4 * max(max(run["full_at"].values()) for run in middle.values()))
    full.set_title("Busy all the time at", fontsize=10)
    full.set_xlabel("requests/s", fontsize=9)
    for axes in (hits, times, full):
        bare(axes)
        axes.title.set_fontweight("bold")
    hits.invert_yaxis()
    full.invert_yaxis()
    shape = (
        f"{machines.servers} servers, {machines.nodes} bank nodes of {machines.node_cores} cores, "
        f"{machines.documents:,} documents, {machines.top_k} a request. "
    )
    figure.supxlabel(shape + caption, fontsize=7.5, color="#555566")
    save_svg(figure, out)


if __name__ == "__main__":
    raise SystemExit(main())
