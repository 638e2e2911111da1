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
NUM_QUESTIONS, NUM_DISTRACTORS, NUM_HAYSTACK = 40, 40, 100  # the first two for each set, the last in all
SEED = 0


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(__file__).with_name("sample")
    data, _ = evaluation_without_leaks(load_split(folder, "test"), load_split(folder, "train"))
    rng = random.Random(f"regrad.evaluate.sample.{SEED}")
    questions, documents = [], []
    for name in SETS:
        chosen = _one_a_document(data, name, rng)
        golds = {question.documents[0] for question in chosen}
        others = [key for key, found in data.documents.items() if found.set_name == name and key not in golds]
        documents += [data.documents[key] for key in (*sorted(golds), *rng.sample(others, NUM_DISTRACTORS))]
        questions += [
            {
                "id": q.id, "set": q.set_name, "domain": q.domain, "kind": q.kind, "question": q.question,
                "answers": list(q.answers), "documents": [q.documents[0]],
            }
            for q in chosen
        ]  # fmt: skip
    haystack = load_documents(folder, "haystack")
    filling = rng.sample(list(haystack), NUM_HAYSTACK)
    _write(out / "test.questions.jsonl", questions)
    _write(out / "test.documents.jsonl", map(_plain, documents))
    _write(out / "haystack.documents.jsonl", (_plain(haystack[key]) for key in filling))


def _one_a_document(data: DataSplit, name: str, rng: random.Random) -> list[Question]:
    """NUM_QUESTIONS questions of a set, each about another document."""
    found = [question for question in data.questions if question.set_name == name]
    rng.shuffle(found)
    first = {question.documents[0]: question for question in reversed(found)}
    return [question for question in found if first[question.documents[0]] is question][:NUM_QUESTIONS]


def _plain(document: SourceDocument) -> Mapping[str, str]:
    return {"id": document.id, "set": document.set_name, "title": document.title, "text": document.text}


def _write(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
