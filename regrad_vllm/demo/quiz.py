"""The demo's documents and questions, and the scoring of answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from regrad_vllm.evaluate.scoring import normalise

DATA = Path(__file__).parent / "data"
DOCUMENTS = DATA / "documents"
NUM_INVENTED = 24


@dataclass(frozen=True, slots=True)
class QuizQuestion:
    """A question whose answer stands in one document."""

    text: str
    answers: tuple[str, ...]
    document_id: str
    invented: bool  # a plain sentence about an invented thing; else a longer text, such as a warranty

    def is_answered_by(self, answer: str) -> bool:
        """Whether a right answer stands in it as whole words. Case, articles and punctuation don't count."""
        said = f" {normalise(answer)} "
        return any(f" {normalise(right)} " in said for right in self.answers)


def load_questions() -> tuple[QuizQuestion, ...]:
    """Questions about invented facts, then about records of five genres. No model can know the answers."""
    return _first("invented", NUM_INVENTED) + _first("records")


def _first(name: str, number: int | None = None) -> tuple[QuizQuestion, ...]:
    """The first question about each of the first ``number`` documents of a set, or about all of them."""
    lines = (DATA / "questions" / f"{name}.jsonl").read_text("utf-8").splitlines()
    found: dict[str, QuizQuestion] = {}
    for record in map(json.loads, lines):
        question = QuizQuestion(record["question"], tuple(record["answers"]), record["document"], name == "invented")
        found.setdefault(question.document_id, question)
    return tuple(islice(found.values(), number))
