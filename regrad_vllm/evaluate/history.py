"""A bank's history: facts that change round by round, documents that go, and what is answered after each round.

Beside it one adapter that goes on being pre-trained on what changed (CPT), which can't delete anything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from regrad_vllm.data.questions import Question, SourceDocument
from regrad_vllm.evaluate.datasets import EvalData

CHANGED_SHARE, DELETED_SHARE = 0.3, 0.05  # of the documents, each round


@dataclass(frozen=True, slots=True)
class Round:
    """The state after a round."""

    num_changes: int  # updates and deletes since the beginning
    data: EvalData  # what the bank holds, and every question that it answers, with today's answer
    changed: tuple[SourceDocument, ...]  # in this round
    stale: tuple[Question, ...]  # questions whose answer has changed, with the answer before the last change
    deleted: tuple[Question, ...]  # questions whose document is gone, with the answer that it gave


def history(data: EvalData, num_rounds: int, seed: int) -> Iterator[Round]:
    """The first round is ``data`` as it is. A change replaces the asked fact's value by that of another document.

    data: one question a document, whose answer stands in it literally (``datasets.fresh_facts``).
    """
    rng = random.Random(f"regrad.evaluate.history.{seed}")
    texts = {document.id: document for document in data.documents}
    today = {question.documents[0]: question for question in data.questions}
    stale: dict[str, Question] = {}
    deleted: list[Question] = []
    num_changes = 0
    yield Round(0, data, (), (), ())
    for _ in range(num_rounds):
        for key in rng.sample(sorted(today), round(DELETED_SHARE * len(today))):
            deleted.append(today.pop(key))
            stale.pop(key, None)
            del texts[key]
            num_changes += 1
        changed = []
        for key in rng.sample(sorted(today), round(CHANGED_SHARE * len(today))):
            value = _other_value(today[key], texts[key], list(today.values()), texts, rng)
            if value is None:
                continue
            (old,) = today[key].answers
            texts[key] = replace(texts[key], text=texts[key].text.replace(old, value))
            stale[key], today[key] = today[key], replace(today[key], answers=(value,))
            changed.append(texts[key])
            num_changes += 1
        now = EvalData(tuple(texts.values()), tuple(today.values()))
        yield Round(num_changes, now, tuple(changed), tuple(stale.values()), tuple(deleted))


def _other_value(
    question: Question,
    document: SourceDocument,
    questions: Sequence[Question],
    texts: dict[str, SourceDocument],
    rng: random.Random,
) -> str | None:
    """The answer to the same question about another subject; None where nobody else is asked it."""
    asked = question.question.replace(document.title, "")
    values = sorted(
        {
            other.answers[0]
            for other in questions
            if other.question.replace(texts[other.documents[0]].title, "") == asked
            and other.answers != question.answers
            and other.answers[0] not in document.text
        }
    )
    return rng.choice(values) if values and question.answers[0] in document.text else None
