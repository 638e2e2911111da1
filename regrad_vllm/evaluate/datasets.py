"""The data of an evaluation: documents for the bank, and questions whose answers stand in them."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from regrad_vllm.data.leaks import evaluation_without_leaks
from regrad_vllm.data.questions import DataSplit, EvalData, Question, SourceDocument, in_passages, load_split
from regrad_vllm.learn.synthetic import Split, synthetic_documents

SAMPLE = Path(__file__).parent / "sample"  # a sample of the test split, with the licences of its sets


def fresh_facts(num_documents: int, seed: int, split: Split = "test") -> EvalData:
    """Documents of invented facts that no training run saw, with one question each.

    The questions take turns among the kinds of facts.
    """
    documents, questions = [], []
    for index, made in enumerate(islice(synthetic_documents(split, seed), num_documents)):
        key = f"fresh-{split}-{seed}-{index}"
        documents.append(SourceDocument(key, made.title, made.text, "fresh"))
        question, answer = made.questions[index % len(made.questions)]
        questions.append(Question(f"{key}?", question, (answer,), (key,), "fresh"))
    return EvalData(tuple(documents), tuple(questions))


def question_sets(
    data: DataSplit, names: Sequence[str], num_questions: int, num_distractors: int, seed: int
) -> EvalData:
    """``num_questions`` questions of each set, their documents in passages, and ``num_distractors`` other passages.

    ValueError names a set that the data doesn't have.
    """
    data = in_passages(data)
    rng = random.Random(f"regrad.evaluate.{seed}")
    by_set: dict[str, list[Question]] = {}
    for question in data.questions:
        by_set.setdefault(question.set_name, []).append(question)
    questions: list[Question] = []
    chosen: dict[str, None] = {}
    for name in names:
        if name not in by_set:
            raise ValueError(f"set {name!r} has no questions in the data; it has {sorted(by_set)}")
        for entry in rng.sample(by_set[name], min(num_questions, len(by_set[name]))):
            questions.append(entry)
            chosen |= dict.fromkeys(entry.documents)
    others = [key for key, document in data.documents.items() if document.set_name in names and key not in chosen]
    for key in rng.sample(others, min(num_distractors, len(others))):
        chosen[key] = None
    return EvalData(tuple(data.documents[key] for key in chosen), tuple(questions))


def distractors(documents: Mapping[str, SourceDocument], number: int, seed: int) -> EvalData:
    """``number`` documents that answer nothing. ValueError if there are fewer."""
    if number > len(documents):
        raise ValueError(f"--haystack must be at most {len(documents)}, which the data holds, got {number}")
    chosen = random.Random(f"regrad.evaluate.haystack.{seed}").sample(list(documents), number)
    return EvalData(tuple(documents[key] for key in chosen), ())


def load_clean(folder: Path, name: str) -> DataSplit:
    """A split without the documents and questions that the folder's training data has too.

    The split "validation" also leaves out those of the test split.
    """
    split = load_split(folder, name)
    for other in ("train", "test") if name == "validation" else ("train",):
        with suppress(FileNotFoundError):
            split, left_out = evaluation_without_leaks(split, load_split(folder, other))
            if left_out:
                sys.stdout.write(f"{len(left_out)} documents and questions that {other} has too are left out\n")
    return split
