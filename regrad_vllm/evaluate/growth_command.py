"""`regrad growth`: the change of the answers as bank, documents and corpus grow.

It draws a curve over each of these:
- the number of documents in the bank;
- the documents of an adapter (k);
- the strength γ;
- the length of the document that holds the answer;
- the size of a corpus that continual pre-training (CPT) holds in one adapter;
- a history of updates and deletes.

It runs in one process with exact search, so only the documents that are found have to be encoded. Each point gives the
share of questions whose document was found. This separates the losses of retrieval from those of the method.
"regrad_gold" is ReGrad with the right document given, "regrad_cue" has two sentences of the documents in the prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from bank_service.values.embedder import default_embedder
from regrad_vllm.arguments import whole
from regrad_vllm.data.questions import EvalData, SourceDocument, in_passages, load_documents
from regrad_vllm.default_model import ensure_default_model, resolve_model, shipped_learner
from regrad_vllm.evaluate.datasets import SAMPLE, fresh_facts, load_clean, question_sets
from regrad_vllm.evaluate.growth import LENGTHS, Grower, Point
from regrad_vllm.evaluate.in_process import ExactSearch, InProcess
from regrad_vllm.learn.synthetic import synthetic_documents
from regrad_vllm.learner import Learner
from regrad_vllm.reporting.intervals import rounded
from regrad_vllm.reporting.plots import new_figure, save_svg
from regrad_vllm.reporting.run_folder import write_json

DOCUMENT_COUNTS = (1000, 2000, 5000, 10_000, 20_000, 50_000)
NUM_HISTORY = 100  # invented documents
_INVENTED = "invented-"
CORPUS_COUNTS = (250, 500, 1000)
_LABELS = {
    "documents": "documents in the bank",
    "documents_k3": "documents in the bank, k = 3",
    "k": "documents an adapter (k)",
    "gamma": "γ",
    "length": "tokens of the document that holds the answer",
    "corpus": "documents in the corpus",
    "history": "updates and deletes so far",
}

_CURVES = [name for name in _LABELS if name != "documents_k3"]  # "documents" includes it


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit status, 0."""
    args = build_parser().parse_args(argv)
    begun = time.monotonic()
    learner = Learner.load(args.learner or shipped_learner())
    model = resolve_model(args.model) if args.model else ensure_default_model()
    data, others = _load(args)
    runner = InProcess(model, learner, {}, dtype=getattr(torch, args.dtype))
    top_k = args.top_k or learner.config.top_k
    grower = Grower(runner, ExactSearch(default_embedder()), data, top_k, args.seed)
    curves: dict[str, Callable[[], Iterator[Point]]] = {
        "documents": lambda: grower.over_documents(others, args.counts),
        "k": grower.over_top_k,
        "gamma": grower.over_gamma,
        "length": lambda: grower.over_length(others, args.lengths),
        "corpus": lambda: grower.over_corpus(others, CORPUS_COUNTS),
        "history": lambda: grower.over_history(fresh_facts(NUM_HISTORY, args.seed, args.split)),
    }
    points: list[Point] = []
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "points.jsonl").open("w", encoding="utf-8") as file:
        for name in args.curves:
            for point in curves[name]():
                points.append(point)
                line = json.dumps(rounded(asdict(point)))
                file.write(line + "\n")
                file.flush()
                sys.stdout.write(line + "\n")
    draw(points, args.out / "growth.svg")
    facts = {
        "command": shlex.join(["regrad", "growth", *argv]),
        "learner": learner.fingerprint[:16],
        "questions": len(data.questions),
        "others": len(others),
        "others_invented": sum(document.id.startswith(_INVENTED) for document in others),
        "top_k": top_k,
        "dtype": args.dtype,
        "seed": args.seed,
        "seconds": round(time.monotonic() - begun, 1),
    }
    summary = {**facts, "points": [rounded(asdict(point)) for point in points]}
    write_json(args.out / "growth.json", summary, ascii=True)
    last = {
        name: [[p.x, round(p.f1.mean, 4)] for p in points if p.curve == name and p.method == "regrad"]
        for name in dict.fromkeys(point.curve for point in points)
    }
    sys.stdout.write(json.dumps({"questions": len(data.questions), **last}) + "\n")
    return 0


def _load(args: argparse.Namespace) -> tuple[EvalData, list[SourceDocument]]:
    """The questions with their documents, and more documents to fill the bank with.

    The latter are the data's other texts and invented ones in one random order. So a bank of any size has the same
    mixture.
    """
    folder = args.data or SAMPLE
    split = load_clean(folder, args.split)
    names = args.sets or list(split.set_names)
    data = fresh_facts(args.num_fresh, args.seed, args.split)
    data = data.merged(question_sets(split, names, args.num_questions, 0, args.seed))
    taken = {document.id for document in data.documents}
    others = [found for key, found in in_passages(split).documents.items() if key not in taken]
    with suppress(FileNotFoundError):  # this split is optional
        others += load_documents(folder, "haystack").values()
    missing = max((*args.counts, *CORPUS_COUNTS)) - len(others) - len(data.documents)
    if missing > 0:
        made = islice(synthetic_documents(args.split, args.seed), args.num_fresh, args.num_fresh + missing)
        others += [SourceDocument(f"{_INVENTED}{number}", each.title, each.text) for number, each in enumerate(made)]
    random.Random(f"regrad.evaluate.growth.{args.seed}").shuffle(others)
    return data, others


def draw(points: Sequence[Point], out: Path) -> None:
    """Draws one panel per curve into ``out``.

    A panel shows F1 with intervals, recall, and ReGrad's F1 over the questions whose document was found.
    """
    names = list(dict.fromkeys(point.curve for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes_grid = new_figure(5 * columns, 4.6 * rows, rows, columns, squeeze=False)
    panels = axes_grid.flat
    for name, axes in zip(names, panels, strict=False):
        chosen = [point for point in points if point.curve == name]
        for method in dict.fromkeys(point.method for point in chosen):
            line = [point for point in chosen if point.method == method]
            xs, colour = [point.x for point in line], f"C{methods.index(method)}"
            axes.plot(xs, [100 * point.f1.mean for point in line], marker="o", ms=3, color=colour, label=method)
            low, high = [100 * point.f1.low for point in line], [100 * point.f1.high for point in line]
            axes.fill_between(xs, low, high, alpha=0.12, color=colour, lw=0)
        regrad = [point for point in chosen if point.method == "regrad"]
        xs, colour = [point.x for point in regrad], f"C{methods.index('regrad')}" if regrad else "k"
        found = [100 * point.found_f1 for point in regrad]
        axes.plot(xs, found, "--", color=colour, lw=1, label="regrad, document found")
        axes.plot(xs, [100 * point.recall for point in regrad], ":", color="#666", label="document found, %")
        axes.set_xlabel(_LABELS[name])
        axes.set_ylabel("F1, %")
        if name in ("documents", "documents_k3", "length", "corpus"):
            axes.set_xscale("log")
            measured = sorted({point.x for point in chosen})
            axes.set_xticks(measured, [f"{x:,g}" for x in measured])
            axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.grid(color="#e3e3e8")
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    for axes in list(panels):
        axes.set_visible(False)
    save_svg(figure, out)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrad growth", description=__doc__)
    parser.add_argument("--model", help="base model, a Hugging Face folder (the default model)")
    parser.add_argument("--learner", type=Path, help="learner folder (the one that ships for the default model)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real questions (the project's sample)")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--sets", nargs="+", help="of the data (all)")
    parser.add_argument("--num-fresh", type=whole(0), default=40, help="documents of invented facts")
    parser.add_argument("--num-questions", type=whole(0), default=40, help="of each real set")
    parser.add_argument("--curves", nargs="+", choices=_CURVES, default=_CURVES)
    parser.add_argument("--lengths", type=whole(8), nargs="+", default=LENGTHS, help="of documents, in tokens")
    parser.add_argument(
        "--counts", nargs="+", type=whole(1), default=list(DOCUMENT_COUNTS), help="documents in the bank"
    )
    parser.add_argument("--top-k", type=whole(1), help="documents a request (the learner's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("growth"))
    return parser
