"""The results as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regrad_vllm.load.comparison import CONTENDERS
from regrad_vllm.load.figures import PERCENTILES, Figures, kv_bytes
from regrad_vllm.load.results import Group, Results
from regrad_vllm.reporting.markdown import markdown_table


def markdown(results: Results) -> str:
    """The report in Markdown: the main results and all tables."""
    parts = ["\n\n".join(summary(results))]
    for group in results.of("cost"):
        parts.append(f"## {describe(group)}\n\n{markdown_table(*cost_table(results, group))}")
        if group.reuse is not None:
            parts.append(reuse_sentence(group))
    if results.of("curve"):
        parts.append(f"## Throughput against latency\n\n{markdown_table(*curve_table(results))}")
    if results.of("growth"):
        parts.append(f"## As k and documents grow\n\n{markdown_table(*growth_table(results))}")
    if results.quality:
        parts.append(f"## Quality and cost\n\n{markdown_table(*quality_table(results))}")
    parts.append(f"## What a request holds\n\n{markdown_table(*memory_table(results, results.main))}")
    parts.append(f"## Where the time goes\n\n{markdown_table(*stages_table(results.main))}")
    parts.append(f"## Before the first request\n\n{markdown_table(*offline_table(results))}")
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> list[str]:
    """The main results, one sentence each."""
    sentences = []
    if results.is_small:
        sentences.append(
            "This run is too small to conclude anything from; raise --repeats (3) and --requests (20 in all repeats)."
        )
    rival = results.main.rival
    for own, name in (("regrad", rival), ("regrad_cue", rival), ("regrad", "base")):
        for group in results.of("cost"):
            over = group.ratio(own, name)
            if name is not None and over is not None:
                ours, label = CONTENDERS[own].label, CONTENDERS[name].label
                sentences.append(f"{ours} over {label}: {over.text()} × the requests/s ({describe(group)}).")
    for name, line in results.slopes().items():
        sentences.append(
            f"{CONTENDERS[name].label}: {line.request.text(1000)} ms a request and {line.token.text(1e6)} µs a "
            "document's token."
        )
    paid = results.break_even()
    if rival is not None and paid is not None:
        sentences.append(
            f"Making a document's gradient has paid off, against {CONTENDERS[rival].label}, after {paid:.1f} requests "
            "a document."
        )
    return sentences


def reuse_sentence(group: Group) -> str:
    """A sentence about the reuse of documents, compared with the published trace."""
    assert group.reuse is not None and group.same_documents is not None
    return (
        f"Of the {group.reuse.references} references to documents the most popular fifth of those found takes "
        f"{group.reuse.top_fifth_share:.0%} (trace: 74%; few references show less of it); "
        f"{group.reuse.repeated_sets:.0%} of the requests have a set of documents that came before as a whole (trace: "
        f"17%). Whoever retrieves answered {group.same_documents:.0%} of the requests with the same documents."
    )


def describe(group: Group) -> str:
    """The heading for a condition."""
    condition = group.condition
    cache = "prefix caching on" if condition.prefix_cache else "prefix caching off (a salt a request)"
    arrival = {
        "closed": "{:g} at a time",
        "poisson": "{:g} requests/s, Poisson",
        "trace": "a trace, {:g} times as fast",
    }
    length = f"{condition.output_tokens} output tokens" if condition.output_tokens else "free length"
    return (
        f"{condition.popularity} popularity, {cache}, k = {condition.top_k}, "
        f"{arrival[condition.arrival.kind].format(condition.arrival.value)}, {length}"
    )


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def cost_table(results: Results, group: Group) -> Table:
    limits = results.run["limits"]
    goodput = f"goodput/s (TTFT ≤ {limits['ttft_ms']:g} ms, TPOT ≤ {limits['tpot_ms']:g} ms)"
    rival = group.rival
    over_what = f"of {CONTENDERS[rival].label}" if rival else "of RAG"
    head = [
        "", "requests/s", over_what, "output tokens/s", goodput, "TTFT p50 p90 p99, ms", "ITL p50 p90 p99, ms",
        "TPOT p50 p90 p99, ms", "E2EL p50 p90 p99, ms", "completed, failed, incomplete",
    ]  # fmt: skip
    rows = []
    for name, found in group.figures.items():
        over = group.ratio(name, rival)
        rows.append(
            [
                CONTENDERS[name].label, found.requests_s.text(), over.text() if over else "–",
                found.output_tokens_s.text(), found.goodput_s.text(), three(found.ttft_ms), three(found.itl_ms),
                three(found.tpot_ms), three(found.e2el_ms), f"{found.completed}, {found.failed}, {found.incomplete}",
            ]
        )  # fmt: skip
    return head, rows


def memory_table(results: Results, group: Group) -> Table:
    """Memory of a running request, bytes moved for it, and the peak sizes of the processes."""
    roles = list(dict.fromkeys(role for found in group.figures.values() for role in found.peak_bytes))
    head = [
        "", "prompt tokens", "KV cache a request, MB", "LoRA slot a request, MB", "documents of all requests, MB",
        "moved a request, kB", "KV cache in use at most", "preemptions", *(f"peak MB: {role}" for role in roles),
    ]  # fmt: skip
    rows = []
    for name, found in group.figures.items():
        kv, slot = memory_bytes(results, name, found)
        pool = found.pool_bytes if CONTENDERS[name].adapter == "retrieved" else None
        share = "–" if found.peak_kv_share is None else f"{found.peak_kv_share:.1%}"
        peaks = [f"{found.peak_bytes.get(role, 0) / 1e6:.0f}" for role in roles]
        rows.append(
            [
                CONTENDERS[name].label, f"{found.prompt_tokens:.0f}", f"{kv / 1e6:.2f}", f"{slot / 1e6:.2f}",
                "–" if pool is None else f"{pool / 1e6:.2f}", f"{found.moved_bytes / 1e3:.1f}", share,
                f"{found.preemptions:.0f}", *peaks,
            ]
        )  # fmt: skip
    return head, rows


def offline_table(results: Results) -> Table:
    head = ["corpus", "documents", "tokens a document", "s a document", "kB a document, as stored"]
    rows = []
    for corpus in results.run["corpora"]:
        number = corpus["documents"]
        seconds = "– (there already)" if corpus["seconds"] is None else f"{corpus['seconds'] / number:.3f}"
        size = f"{corpus['gradient_bytes'] / number / 1e3:.0f}"
        rows.append([corpus["name"], str(number), f"{corpus['mean_tokens']:.0f}", seconds, size])
    return head, rows


def curve_table(results: Results) -> Table:
    head = ["arrival", "", "requests/s", "goodput/s", "TTFT p50 p90 p99, ms", "E2EL p50 p90 p99, ms"]
    rows = []
    for group in results.curve:
        arrival = group.condition.arrival
        for name, found in group.figures.items():
            label = f"{arrival.kind} {arrival.value:g}"
            own = [found.requests_s.text(), found.goodput_s.text(), three(found.ttft_ms), three(found.e2el_ms)]
            rows.append([label, CONTENDERS[name].label, *own])
    return head, rows


def growth_table(results: Results) -> Table:
    head = ["k", "tokens a document", "", "prompt tokens", "requests/s", "s a request", "TTFT p50, ms"]
    rows = []
    for group in results.of("growth"):
        condition = group.condition
        for name, found in group.figures.items():
            seconds = f"{1 / found.requests_s.median:.3f}" if found.requests_s.median else "–"
            rows.append(
                [
                    str(condition.top_k), str(condition.passage_tokens), CONTENDERS[name].label,
                    f"{found.prompt_tokens:.0f}", found.requests_s.text(), seconds,
                    f"{found.ttft_ms.get(50, float('nan')):.0f}",
                ]
            )  # fmt: skip
    return head, rows


def quality_table(results: Results) -> Table:
    head = ["", "EM, %", "F1, %", "requests/s"]
    rows = []
    for name, found in results.quality.items():
        cost = results.main.figures.get(name)
        rows.append(
            [CONTENDERS[name].label, found.em.percent(), found.f1.percent(), cost.requests_s.text() if cost else "–"]
        )
    return head, rows


def stages_table(group: Group) -> Table:
    """Median times on the way to an adapter, CPU time a request by process, and hit rates of the caches."""
    found = group.figures.values()
    stages = list(dict.fromkeys(stage for own in found for stage in own.server_ms))
    roles = list(dict.fromkeys(role for own in found for role in own.cpu_s))
    caches = list(dict.fromkeys(cache for own in found for cache in own.cache_hits))
    head = ["", "client: retrieve, ms", "client: prepare, ms", *(f"server: {stage}, ms" for stage in stages)]
    head += [*(f"CPU ms: {role}" for role in roles), *(f"found in the {cache} cache" for cache in caches)]
    rows = []
    for name, own in group.figures.items():
        server = [f"{own.server_ms[stage]:.1f}" if stage in own.server_ms else "–" for stage in stages]
        cpu = [f"{1000 * own.cpu_s.get(role, 0.0):.0f}" for role in roles]
        hits = [f"{own.cache_hits[cache]:.0%}" if cache in own.cache_hits else "–" for cache in caches]
        rows.append([CONTENDERS[name].label, f"{own.retrieve_ms:.1f}", f"{own.prepare_ms:.1f}", *server, *cpu, *hits])
    return head, rows


def memory_bytes(results: Results, name: str, found: Figures) -> tuple[float, float]:
    """(KV cache in whole blocks, none shared; LoRA slot) of one request alone while it runs."""
    sizes = results.run["sizes"]
    kv = kv_bytes(found, sizes["kv_bytes_per_token"], sizes["kv_block_tokens"])
    return kv, sizes["adapter_bytes"] if CONTENDERS[name].engine == "stock" else 0


def three(found: Mapping[int, float]) -> str:
    """The percentiles. A dash stands for a percentile that needs more requests."""
    return " · ".join(f"{found[p]:.0f}" if p in found else "–" for p in PERCENTILES)
