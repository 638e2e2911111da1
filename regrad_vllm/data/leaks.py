"""Does evaluation data stand in training data? By normalised text, so that case and punctuation hide nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from regrad_vllm.data.questions import DataSplit

DOCUMENT_NGRAM = 13  # words in a row that two different texts hardly share
MAX_SHARED = 0.2  # of a document's n-grams; more is the same text, fewer are quotations and phrases
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Leak:
    """Something of the evaluation data that the training data has too."""

    kind: str  # "document" or "question"
    evaluation_id: str
    training_id: str
    shared: float  # share of the evaluation document's n-grams; 1 for a question

    def __str__(self) -> str:
        return f"{self.kind} {self.evaluation_id} stands in the training data as {self.training_id} ({self.shared:.0%})"


def find_leaks(training: DataSplit, evaluation: DataSplit) -> list[Leak]:
    """Evaluation documents of which more than MAX_SHARED of the n-grams (of a document that is shorter than one: its
    whole text) stand in one training document, and questions that training asks with the same answer."""
    return [*_document_leaks(training, evaluation), *_question_leaks(training, evaluation)]


def without_leaks(training: DataSplit, evaluations: Iterable[DataSplit]) -> tuple[DataSplit, tuple[str, ...]]:
    """The training data without what stands in evaluation data too, and the ids of the documents and questions left
    out. A question goes with its documents."""
    leaks = [leak for evaluation in evaluations for leak in find_leaks(training, evaluation)]
    gone = {kind: {leak.training_id for leak in leaks if leak.kind == kind} for kind in ("document", "question")}
    documents = {key: document for key, document in training.documents.items() if key not in gone["document"]}
    questions = tuple(
        question
        for question in training.questions
        if question.id not in gone["question"] and all(key in documents for key in question.documents)
    )
    return DataSplit(documents, questions), tuple(sorted(gone["document"] | gone["question"]))


def _document_leaks(training: DataSplit, evaluation: DataSplit) -> Iterator[Leak]:
    owners: dict[int, list[str]] = {}
    texts = {key: f" {_normal(document.text)} " for key, document in training.documents.items()}
    for key, document in training.documents.items():
        for gram in _ngrams(_words(document.text)):
            owners.setdefault(gram, []).append(key)
    for key, document in evaluation.documents.items():
        words = _words(document.text)
        if len(words) < DOCUMENT_NGRAM:
            text = f" {' '.join(words)} "
            yield from (Leak("document", key, owner, 1.0) for owner, known in texts.items() if words and text in known)
            continue
        grams = _ngrams(words)
        counts = Counter(owner for gram in grams for owner in owners.get(gram, ()))
        yield from (
            Leak("document", key, owner, count / len(grams))
            for owner, count in counts.items()
            if count > MAX_SHARED * len(grams)
        )


def _question_leaks(training: DataSplit, evaluation: DataSplit) -> Iterator[Leak]:
    asked = {(_normal(q.question), _normal(answer)): q.id for q in training.questions for answer in q.answers}
    for question in evaluation.questions:
        for answer in question.answers:
            other = asked.get((_normal(question.question), _normal(answer)))
            if other is not None:
                yield Leak("question", question.id, other, 1.0)
                break


def _ngrams(words: Sequence[str]) -> set[int]:
    return {hash(tuple(words[start : start + DOCUMENT_NGRAM])) for start in range(len(words) - DOCUMENT_NGRAM + 1)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _normal(text: str) -> str:
    return " ".join(_words(text))
