"""Rebuilds ``sample/`` from the whole data: python -m regrad_vllm.evaluate.make_sample FOLDER

The sample comes from the test split and the haystack, and only from sets whose licence allows it. With the sample
`regrad eval` needs no other data.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from regrad_vllm.data.leaks import evaluation_without_leaks
from regrad_vllm.data.questions import DataSplit, Question, SourceDocument, load_documents, load_split

SETS = ("squad", "nq", "qamr", "pubmedqa")
LATER_SETS = ("records",)  # drawn last, so that the others stay as they were
NUM_QUESTIONS, NUM_DISTRACTORS, NUM_HAYSTACK = 40, 40, 100  # the first two for each set, the last in all
SEED = 0


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(__file__).with_name("sample")
    data, _ = evaluation_without_leaks(load_split(folder, "test"), load_split(folder, "train"))
    rng = random.Random(f"regrad.evaluate.sample.{SEED}")
    haystack = load_documents(folder, "haystack")
    drawn = [_draw(data, name, rng) for name in SETS]
    filling = rng.sample(list(haystack), NUM_HAYSTACK)
    drawn += [_draw(data, name, rng) for name in LATER_SETS]
    _write(out / "test.questions.jsonl", (_asked(question) for questions, _ in drawn for question in questions))
    _write(out / "test.documents.jsonl", (_plain(document) for _, documents in drawn for document in documents))
    _write(out / "haystack.documents.jsonl", (_plain(haystack[key]) for key in filling))


def _draw(data: DataSplit, name: str, rng: random.Random) -> tuple[list[Question], list[SourceDocument]]:
    """A set's questions and documents, those that answer first."""
    questions = _one_a_document(data, name, rng)
    golds = {question.documents[0] for question in questions}
    others = [key for key, found in data.documents.items() if found.set_name == name and key not in golds]
    return questions, [data.documents[key] for key in (*sorted(golds), *rng.sample(others, NUM_DISTRACTORS))]


def _one_a_document(data: DataSplit, name: str, rng: random.Random) -> list[Question]:
    """NUM_QUESTIONS questions of a set, each about another document."""
    found = [question for question in data.questions if question.set_name == name]
    rng.shuffle(found)
    first = {question.documents[0]: question for question in reversed(found)}
    return [question for question in found if first[question.documents[0]] is question][:NUM_QUESTIONS]


def _asked(question: Question) -> Mapping[str, object]:
    return {
        "id": question.id, "set": question.set_name, "domain": question.domain, "kind": question.kind,
        "question": question.question, "answers": list(question.answers), "documents": [question.documents[0]],
    }  # fmt: skip


def _plain(document: SourceDocument) -> Mapping[str, str]:
    return {"id": document.id, "set": document.set_name, "title": document.title, "text": document.text}


def _write(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
