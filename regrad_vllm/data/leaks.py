"""Finds evaluation data that is also in the training data. Texts are compared without case and punctuation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from regrad_vllm.data.questions import DataSplit, plain_words

DOCUMENT_NGRAM = 13  # words; two different texts hardly ever share so many in a row
# Two documents are the same text if they share more than this part of the smaller one's n-grams. Less is a quotation.
MAX_SHARED = 0.2


@dataclass(frozen=True, slots=True)
class Leak:
    """A document or a question that evaluation data and training data share."""

    kind: str  # "document" or "question"
    evaluation_id: str
    training_id: str
    shared: float  # share of the smaller document's n-grams; 1 for a question


def find_leaks(training: DataSplit, evaluation: DataSplit) -> list[Leak]:
    """The pairs of documents that share text, and the questions that both splits have with the same answer.

    Documents share text if they have more than MAX_SHARED of the smaller one's n-grams in common. A document shorter
    than an n-gram is compared as a whole.
    """
    return [*_document_leaks(training, evaluation), *_question_leaks(training, evaluation)]


def without_leaks(training: DataSplit, evaluations: Iterable[DataSplit]) -> tuple[DataSplit, tuple[str, ...]]:
    """The training data without its leaks into ``evaluations``, and the ids of the removed documents and questions.

    A question whose document is removed is removed too.
    """
    leaks = [leak for evaluation in evaluations for leak in find_leaks(training, evaluation)]
    return _without(training, [(leak.kind, leak.training_id) for leak in leaks])


def evaluation_without_leaks(evaluation: DataSplit, training: DataSplit) -> tuple[DataSplit, tuple[str, ...]]:
    """The evaluation data without its leaks from ``training``, and the ids of the removed documents and questions.

    It is for a learner that is trained already.
    """
    return _without(evaluation, [(leak.kind, leak.evaluation_id) for leak in find_leaks(training, evaluation)])


def _without(data: DataSplit, gone: Iterable[tuple[str, str]]) -> tuple[DataSplit, tuple[str, ...]]:
    ids: dict[str, set[str]] = {"document": set(), "question": set()}
    for kind, key in gone:
        ids[kind].add(key)
    documents = {key: document for key, document in data.documents.items() if key not in ids["document"]}
    questions = tuple(
        question
        for question in data.questions
        if question.id not in ids["question"] and all(key in documents for key in question.documents)
    )
    return DataSplit(documents, questions), tuple(sorted(ids["document"] | ids["question"]))


def _document_leaks(training: DataSplit, evaluation: DataSplit) -> Iterator[Leak]:
    known = _texts(training)
    owners: dict[int, list[str]] = {}
    sizes: dict[str, int] = {}
    for key, text in known.items():
        grams = _ngrams(text.split())
        sizes[key] = len(grams)
        for gram in grams:
            owners.setdefault(gram, []).append(key)
    asked = _texts(evaluation)
    for key, text in asked.items():
        grams = _ngrams(text.split())
        for owner, count in Counter(owner for gram in grams for owner in owners.get(gram, ())).items():
            shared = count / min(len(grams), sizes[owner])
            if shared > MAX_SHARED:
                yield Leak("document", key, owner, shared)
    for whole, part in _contained(known, asked):
        yield Leak("document", part, whole, 1.0)
    for whole, part in _contained(asked, known):
        yield Leak("document", whole, part, 1.0)


def _texts(data: DataSplit) -> dict[str, str]:
    return {key: plain_words(document.text) for key, document in data.documents.items()}


def _contained(wholes: Mapping[str, str], parts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(whole, part) for each part, too short for an n-gram, that is contained in a whole."""
    padded = {key: f" {text} " for key, text in wholes.items()}
    everything = "\n".join(padded.values())
    for part, text in parts.items():
        words = f" {text} "
        if text and len(text.split()) < DOCUMENT_NGRAM and words in everything:
            yield from ((whole, part) for whole, found in padded.items() if words in found)


def _question_leaks(training: DataSplit, evaluation: DataSplit) -> Iterator[Leak]:
    asked: dict[tuple[str, str], list[str]] = {}  # a question may occur more than once
    for question in training.questions:
        for answer in {plain_words(answer) for answer in question.answers}:
            asked.setdefault((plain_words(question.question), answer), []).append(question.id)
    for question in evaluation.questions:
        words = plain_words(question.question)
        found = {other for answer in question.answers for other in asked.get((words, plain_words(answer)), ())}
        for other in sorted(found):
            yield Leak("question", question.id, other, 1.0)


def _ngrams(words: Sequence[str]) -> set[int]:
    return {hash(tuple(words[start : start + DOCUMENT_NGRAM])) for start in range(len(words) - DOCUMENT_NGRAM + 1)}
