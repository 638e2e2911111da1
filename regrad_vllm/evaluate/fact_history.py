"""A bank's history in rounds: facts change, documents are deleted, and after each round the questions are asked.

Its rival is one adapter that is pre-trained further on the changes (CPT). It can't delete anything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from regrad_vllm.data.questions import EvalData, Question, SourceDocument
from regrad_vllm.learn.synthetic import another_value

CHANGED_SHARE, DELETED_SHARE = 0.3, 0.05  # of the documents, each round


@dataclass(frozen=True, slots=True)
class Round:
    """The bank after a round of changes."""

    num_changes: int  # updates and deletes since the beginning
    data: EvalData  # the bank's documents, and all questions that they answer, with the present answers
    changed: tuple[SourceDocument, ...]  # the documents changed in this round
    stale: tuple[Question, ...]  # questions whose answer has changed, with their answer before the last change
    deleted: tuple[Question, ...]  # questions whose document is deleted, with the deleted answer


def history(data: EvalData, num_rounds: int, seed: int) -> Iterator[Round]:
    """The rounds. The first one is ``data`` unchanged. A change gives the fact of a question another value.

    data: documents with one question each, as ``datasets.fresh_facts`` makes them.
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
            (old,) = today[key].answers
            value = another_value(texts[key].title, today[key].question, texts[key].text, rng)
            texts[key] = replace(texts[key], text=texts[key].text.replace(old, value))
            stale[key], today[key] = today[key], replace(today[key], answers=(value,))
            changed.append(texts[key])
            num_changes += 1
        now = EvalData(tuple(texts.values()), tuple(today.values()))
        yield Round(num_changes, now, tuple(changed), tuple(stale.values()), tuple(deleted))
