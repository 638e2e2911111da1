"""`regrad eval`: which share of the questions each method answers, through a running server.

By default it starts a bank and a server of its own, ingests the documents, asks, prints a table and one JSON
object, and leaves every answer in a JSONL file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from regrad_vllm.default_model import ensure_default_model, resolve_model, shipped_learner
from regrad_vllm.evaluate.asking import Endpoint, ask_all
from regrad_vllm.evaluate.datasets import EvalData, fresh_facts, question_sets
from regrad_vllm.evaluate.ingest import ingest
from regrad_vllm.evaluate.methods import DEFAULT_METHODS, METHODS
from regrad_vllm.evaluate.report import markdown, recall, summarise
from regrad_vllm.learner import Learner

_NAMESPACE = "eval"
_MODEL = "base"


def main(argv: Sequence[str]) -> int:
    """Returns 0 where every request was answered."""
    args = _parser().parse_args(argv)
    begun = time.monotonic()
    learner_folder = args.learner or shipped_learner()
    learner = Learner.load(learner_folder)
    model = resolve_model(args.model) if args.model else ensure_default_model()
    data = load_data(args)
    out = args.out or Path(tempfile.mkdtemp(prefix="regrad-eval-"))
    out.mkdir(parents=True, exist_ok=True)
    with _served(args, model, learner_folder, out) as (server, bank):
        ingest(data.documents, bank, _NAMESPACE, out)
        endpoint = Endpoint(server, bank, args.model_name, _NAMESPACE, args.top_k, args.concurrency)
        records = asyncio.run(ask_all(endpoint, data, learner, args.methods, args.seed, out / "answers.jsonl"))
    summary, found = summarise(records, args.methods), recall(records)
    table = markdown(summary, found)
    report = {
        "learner": learner.fingerprint[:16],
        "top_k": args.top_k or learner.config.top_k,
        "documents": len(data.documents),
        "seed": args.seed,
        "recall": found,
        "sets": summary,
        "seconds": round(time.monotonic() - begun, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    sys.stdout.write(f"{table}\n\nevery answer: {out / 'answers.jsonl'}\n{json.dumps(report)}\n")
    return int(any(record.error for record in records))


def load_data(args: argparse.Namespace) -> EvalData:
    """Documents of invented facts, and with --data real questions of its test split."""
    data = fresh_facts(args.num_fresh, args.seed, args.split) if args.num_fresh else EvalData((), ())
    if args.data:
        sets = question_sets(args.data, args.split, args.sets, args.num_questions, args.num_distractors, args.seed)
        data = data.merged(sets)
    if not data.questions:
        raise ValueError("--num-fresh must be at least 1 where --data is absent, else there is nothing to ask")
    return data


@contextmanager
def _served(args: argparse.Namespace, model: Path, learner: Path, out: Path) -> Iterator[tuple[str, str]]:
    """(server's URL, bank's address): those given, or a pair of our own for as long as the context lasts."""
    if args.server:
        yield args.server, args.bank
        return
    from regrad_vllm.local.pair import local_pair

    with local_pair(model, learner, out, model_name=args.model_name, namespace=_NAMESPACE) as pair:
        yield pair.url, pair.bank


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrad eval", description=__doc__)
    parser.add_argument("--model", help="base model, a Hugging Face folder (the default model)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.add_argument("--server", help="URL of a running server, with --bank; else both are started")
    parser.add_argument("--bank", help="host:port of the server's bank")
    parser.add_argument("--model-name", default=_MODEL, help="the base model's name at the server")
    parser.add_argument("--num-fresh", type=int, default=120, help="documents of invented facts, one question each")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real questions: <split>.*.jsonl.gz")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--sets", nargs="+", default=["squad", "nq", "newpages_mixed", "qamr"])
    parser.add_argument("--num-questions", type=int, default=60, help="of each real set")
    parser.add_argument("--num-distractors", type=int, default=200, help="real documents that answer no question")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT_METHODS))
    parser.add_argument("--top-k", type=int, help="documents a request (the learner's)")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="answers and report (a new temporary folder)")
    return parser
