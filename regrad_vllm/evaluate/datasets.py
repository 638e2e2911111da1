"""What is asked: documents for the bank, and questions whose answers stand in them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from regrad_vllm.learn.synthetic import Split, synthetic_documents


@dataclass(frozen=True, slots=True)
class EvalDocument:
    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class EvalQuestion:
    set_name: str
    question: str
    answers: tuple[str, ...]
    document_id: str  # the document that holds the answer


@dataclass(frozen=True, slots=True)
class EvalData:
    documents: tuple[EvalDocument, ...]
    questions: tuple[EvalQuestion, ...]

    def merged(self, other: EvalData) -> EvalData:
        return EvalData(self.documents + other.documents, self.questions + other.questions)


def fresh_facts(num_documents: int, seed: int, split: Split = "test") -> EvalData:
    """Documents of invented facts that no training run saw, one question each, taking turns among the facts."""
    documents, questions = [], []
    for index, made in enumerate(islice(synthetic_documents(split, seed), num_documents)):
        key = f"fresh-{split}-{seed}-{index}"
        documents.append(EvalDocument(key, made.title, made.text))
        question, answer = made.questions[index % len(made.questions)]
        questions.append(EvalQuestion("fresh", question, (answer,), key))
    return EvalData(tuple(documents), tuple(questions))


def question_sets(
    folder: Path, split: str, names: Sequence[str], num_questions: int, num_distractors: int, seed: int
) -> EvalData:
    """``num_questions`` of each set from ``<split>.*.jsonl.gz``, their documents, and other documents of the same sets.

    Raises FileNotFoundError, or ValueError naming a set that isn't there.
    """
    rng = random.Random(f"regrad.evaluate.{seed}")
    documents = {entry["id"]: entry for entry in _lines(folder / f"{split}.documents.jsonl.gz")}
    by_set: dict[str, list[dict[str, Any]]] = {}
    for entry in _lines(folder / f"{split}.questions.jsonl.gz"):
        if entry["gold"] and entry["gold"][0] in documents:
            by_set.setdefault(entry["set"], []).append(entry)
    questions: list[EvalQuestion] = []
    chosen: dict[str, None] = {}
    for name in names:
        if name not in by_set:
            raise ValueError(f"set {name!r} has no questions in {folder} ({split}); it has {sorted(by_set)}")
        for entry in rng.sample(by_set[name], min(num_questions, len(by_set[name]))):
            questions.append(EvalQuestion(name, entry["question"], tuple(entry["answers"]), entry["gold"][0]))
            chosen[entry["gold"][0]] = None
    others = [key for key, entry in documents.items() if entry["set"] in names and key not in chosen]
    for key in rng.sample(others, min(num_distractors, len(others))):
        chosen[key] = None
    made = tuple(EvalDocument(key, documents[key]["title"].strip(), documents[key]["text"]) for key in chosen)
    return EvalData(made, tuple(questions))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines():
        if line.strip():
            yield json.loads(line)
