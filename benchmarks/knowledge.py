"""How much a learner knows with nothing, a sentence or the documents in the prompt. The right documents are given.

    python -m benchmarks.knowledge --data FOLDER --learners NAME=FOLDER … --readers NAME=FOLDER … --out FILE

Asks questions of the validation split in one process. A cue is the documents' sentence nearest to the question, or
several with --cue-sentences (learn/cues.py). A learner is asked blind, with the cue, with the documents, and as φ*
alone with the cue. A reader is a learner whose φ* alone is used, such as FT-RAG's. It is asked with the cue and with
the documents. Each answer is a line of FILE. Answers in FILE are not asked again, so that learners can be added to the
same table. After the table, the last line is the same figures as one JSON object.

F1 is of greedy answers. "First" is the share of answers that begin with the right token. The intervals are 95%
bootstrap intervals over documents; differences are paired. Gradients are not quantised here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bank_service.values.embedder import default_embedder, embedded_text
from regrad_vllm.arguments import whole
from regrad_vllm.compose import compose
from regrad_vllm.data.questions import Question, SourceDocument
from regrad_vllm.default_model import resolve_model
from regrad_vllm.evaluate.datasets import load_clean, question_sets
from regrad_vllm.evaluate.in_process import InProcess
from regrad_vllm.evaluate.scoring import score
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learner import Learner
from regrad_vllm.reporting.intervals import Interval, rounded, stratified_interval
from regrad_vllm.reporting.markdown import markdown_table

SETS = ("records", "squad", "qamr", "hops", "newpages_bio")
LEARNER_WAYS, READER_WAYS = ("blind", "cue", "icl", "phi_cue"), ("cue", "icl")
_BATCH = 16  # questions
_ENCODED_AT_ONCE = 64  # documents


@dataclass(frozen=True, slots=True)
class Asked:
    question: Question
    documents: tuple[SourceDocument, ...]  # that answer it together, best score first
    scores: tuple[float, ...]
    cue: tuple[tuple[str, str], ...]  # (title, sentence) each

    def shown(self, way: str) -> list[tuple[str, str]]:
        """The texts in the prompt."""
        if way == "icl":
            return [(document.title, document.text) for document in self.documents]
        return [] if way == "blind" else list(self.cue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--learners", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--readers", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--ways", nargs="+", choices=LEARNER_WAYS, default=list(LEARNER_WAYS))
    parser.add_argument(
        "--cue-sentences", type=whole(1), default=1, help="more than one: the way is called cue2 and so on"
    )
    parser.add_argument("--num-questions", type=whole(1), default=64, help="of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    asked = load(args)
    model = resolve_model("default")
    for entries, ways in ((args.learners, LEARNER_WAYS), (args.readers, READER_WAYS)):
        for name, _, folder in (entry.partition("=") for entry in entries):
            learner = Learner.load(folder)
            answerer = Answerer(InProcess(model, learner, {}, dtype=getattr(torch, args.dtype)), learner)
            for way in (way for way in ways if way in args.ways):
                adapter = "phi" if ways is READER_WAYS or way == "phi_cue" else "gradients"
                label = f"{way}{args.cue_sentences}" if args.cue_sentences > 1 and way.endswith("cue") else way
                known = {(r["learner"], r["way"], r["id"]) for r in records(args.out)}
                waiting = [entry for entry in asked if (name, label, entry.question.id) not in known]
                started = time.monotonic()
                with args.out.open("a", encoding="utf-8") as file:
                    for found in answerer.answer(waiting, way, adapter):
                        file.write(json.dumps({"learner": name, "way": label, **found}, ensure_ascii=False) + "\n")
                        file.flush()
                sys.stderr.write(f"{name} {label}: {len(waiting)} questions, {time.monotonic() - started:.0f} s\n")
    found = summary(list(records(args.out)), {entry.question.id for entry in asked})
    sys.stdout.write(table(found["methods"], found["differences"]) + "\n\n")
    sys.stdout.write(json.dumps(rounded(found), ensure_ascii=False) + "\n")


def load(args: argparse.Namespace) -> list[Asked]:
    """Questions of the validation split with their documents and cues."""
    split = load_clean(args.data, "validation")
    together = {question.id for question in split.questions if len(question.documents) > 1}
    chosen = question_sets(split, args.sets, args.num_questions, 0, args.seed)
    documents = {document.id: document for document in chosen.documents}
    embedder = default_embedder()
    cues = Cues(embedder, args.cue_sentences)
    asked = []
    for question in chosen.questions:
        right = [documents[key] for key in question.documents[: None if question.id in together else 1]]
        vector = embedder.embed(question.question)
        scored = [(float(vector @ embedder.embed(embedded_text(found.title, found.text))), found) for found in right]
        scored.sort(key=lambda pair: -pair[0])
        best = tuple(document for _, document in scored)
        cue = cues.nearest(question.question, [(document.title, document.text) for document in best])
        asked.append(Asked(question, best, tuple(value for value, _ in scored), cue))
    return asked


class Answerer:
    """One learner."""

    def __init__(self, process: InProcess, learner: Learner) -> None:
        self._process, self._learner = process, learner
        self._deltas: dict[str, NDArray[np.float32]] = {}

    def answer(self, asked: Sequence[Asked], way: str, adapter: str) -> Iterator[dict[str, Any]]:
        """A record of each question."""
        builder = self._process.builder
        prompted = []
        for entry in asked:
            shown = [builder.prompts.render_document(*passage) for passage in entry.shown(way)]
            prompted.append((builder.question(entry.question.question, shown), entry))
        if adapter == "gradients":
            self._encode({document.id: document for entry in asked for document in entry.documents})
        prompted.sort(key=lambda pair: len(pair[0]))  # little padding
        for start in range(0, len(prompted), _BATCH):
            prompts, batch = zip(*prompted[start : start + _BATCH], strict=True)
            adapters = [self._learner.phi if adapter == "phi" else self._compose(entry) for entry in batch]
            for prompt, entry, said in zip(prompts, batch, self._process.generate(prompts, adapters), strict=True):
                begins = {builder.answer(answer)[0] for answer in entry.question.answers}
                yield {
                    "id": entry.question.id,
                    "set": entry.question.set_name,
                    "document": entry.documents[0].id,
                    "f1": score(said, entry.question.answers, entry.question.kind),
                    "first": builder.answer(said)[0] in begins,
                    "prompt_tokens": len(prompt),
                    "said": said,
                }

    def _encode(self, documents: Mapping[str, SourceDocument]) -> None:
        missing = [document for key, document in documents.items() if key not in self._deltas]
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            some = missing[start : start + _ENCODED_AT_ONCE]
            encoded = self._process.encoder.encode([(document.title, document.text) for document in some])
            self._deltas.update({document.id: found.values for document, found in zip(some, encoded, strict=True)})

    def _compose(self, entry: Asked) -> NDArray[np.float32]:
        deltas = [self._deltas[document.id] for document in entry.documents]
        config = self._learner.config
        return compose(self._learner.phi, deltas, config.weights(entry.scores), config.gamma)


def records(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text("utf-8").splitlines())


def summary(found: Sequence[Mapping[str, Any]], ids: set[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each method: F1 by set and over all sets, the share of right first tokens, prompt tokens. Then the paired
    differences of F1 between methods that were asked the same questions."""
    methods: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in found:
        if record["id"] in ids:
            methods.setdefault(f"{record['learner']} {record['way']}", {})[record["id"]] = record
    sets = sorted({record["set"] for rows in methods.values() for record in rows.values()})
    means = {
        name: {
            "by_set": {key: mean([row["f1"] for row in rows.values() if row["set"] == key]) for key in sets},
            "all": asdict(interval(rows, {key: row["f1"] for key, row in rows.items()}, sets)),
            "first": mean([row["first"] for row in rows.values()]),
            "prompt_tokens": mean([row["prompt_tokens"] for row in rows.values()]),
        }
        for name, rows in methods.items()
    }
    differences = {
        f"{name} − {other}": asdict(interval(rows, {key: rows[key]["f1"] - others[key]["f1"] for key in rows}, sets))
        for (name, rows), (other, others) in combinations(methods.items(), 2)
        if rows.keys() == others.keys()
    }
    return {"methods": means, "differences": differences}


def table(means: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, float]]) -> str:
    """Both parts of the summary in percent."""
    sets = list(dict.fromkeys(key for row in means.values() for key in row["by_set"]))
    rows = []
    for name, row in means.items():
        by_set = [percent(row["by_set"][key]) for key in sets]
        last = [Interval(**row["all"]).percent(), percent(row["first"]), f"{row['prompt_tokens']:.0f}"]
        rows.append([name, *by_set, *last])
    paired = [[name, Interval(**difference).percent()] for name, difference in differences.items()]
    return "\n\n".join(
        [
            markdown_table(["", *sets, "all", "first", "prompt"], rows),
            markdown_table(["paired difference of F1", "all"], paired),
        ]
    )


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def interval(rows: Mapping[str, Mapping[str, Any]], values: Mapping[str, float], sets: Sequence[str]) -> Interval:
    """Mean of the sets' means with its interval."""
    groups = [[key for key, row in rows.items() if row["set"] == chosen] for chosen in sets]
    groups = [group for group in groups if group]
    return stratified_interval(
        [[values[key] for key in group] for group in groups],
        [[str(rows[key]["document"]) for key in group] for group in groups],
    )


if __name__ == "__main__":
    main()
