"""Writes the demo's invented documents and their questions: ``python -m regrad_vllm.demo.people``.

The generator of the training data makes them, from its test split. No training document uses any of these names.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

from regrad_vllm.learn.synthetic import synthetic_documents

NUM_DOCUMENTS = 60
SEED = 2026
DATA = Path(__file__).parent / "data"


def invented() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(documents, questions). Each document has one question, about its facts in turns."""
    documents: list[dict[str, object]] = []
    questions: list[dict[str, object]] = []
    for index, made in enumerate(islice(synthetic_documents("test", SEED), NUM_DOCUMENTS)):
        document_id = f"{made.kind}-" + re.sub(r"[^a-z]+", "-", made.title.lower()).strip("-")
        documents.append({"id": document_id, "title": made.title, "text": made.text, "set": "invented"})
        question, answer = made.questions[index % len(made.questions)]
        questions.append({"question": question, "answers": [answer], "document": document_id})
    return documents, questions


def render(records: list[dict[str, object]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    for folder, records in zip(("documents", "questions"), invented(), strict=True):
        (DATA / folder / "invented.jsonl").write_text(render(records), "utf-8")
