"""The curves of `regrad growth`: the same questions are asked while one quantity grows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from bank_service.values.sentences import split_sentences
from bank_service.wire.limits import DEFAULT_CUE_SENTENCES
from regrad_vllm.data.questions import DataSplit, EvalData, SourceDocument, holds, in_passages, plain_words
from regrad_vllm.data.token_counts import count_tokens
from regrad_vllm.evaluate.answers import Record
from regrad_vllm.evaluate.fact_history import history
from regrad_vllm.evaluate.in_process import ExactSearch, InProcess
from regrad_vllm.evaluate.methods import METHODS, Method
from regrad_vllm.evaluate.retrieve import Retrieved
from regrad_vllm.reporting.intervals import Interval, stratified_interval

TOP_KS = (1, 2, 3, 5, 7, 10)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LENGTHS = (32, 64, 128, 256, 512, 1024)  # tokens
NUM_ROUNDS = 6  # of updates and deletes


@dataclass(frozen=True, slots=True)
class Point:
    """F1 of one method at one point of a curve, the mean over the sets."""

    curve: str
    x: float
    method: str
    f1: Interval
    recall: float  # share of the questions whose document was among the hits
    found_f1: float  # F1 over those questions alone; the mean over the sets that have such questions


class Grower:
    """Computes the points of each curve."""

    def __init__(self, runner: InProcess, searcher: ExactSearch, data: EvalData, top_k: int, seed: int) -> None:
        self._runner = runner
        self._searcher = searcher
        self._data = data
        self._top_k = top_k
        self._seed = seed

    def over_documents(self, others: Sequence[SourceDocument], counts: Sequence[int]) -> Iterator[Point]:
        """A bank of ``count`` documents: the questions' own ones, filled up with others."""
        for count in counts:
            more = others[: max(0, count - len(self._data.documents))]
            data = self._data.merged(EvalData(tuple(more), ()))
            for method in ("regrad", "regrad_cue", "regrad_gold", "rag", "rag_learner"):
                yield self._point("documents", len(data.documents), METHODS[method], data, self._top_k)
            # With one document an adapter is the same in any bank. With three, the other two depend on the bank.
            for method in ("regrad", "regrad_cue"):
                yield self._point("documents_k3", len(data.documents), METHODS[method], data, 3)

    def over_top_k(self, top_ks: Sequence[int] = TOP_KS) -> Iterator[Point]:
        for top_k in top_ks:
            for method in ("regrad", "rag_learner"):
                yield self._point("k", top_k, METHODS[method], self._data, top_k)

    def over_gamma(self, gammas: Sequence[float] = GAMMAS) -> Iterator[Point]:
        for gamma in gammas:
            yield self._point("gamma", gamma, METHODS["regrad"], self._data, self._top_k, gamma)

    def _point(
        self, curve: str, x: float, method: Method, data: EvalData, top_k: int, gamma: float | None = None
    ) -> Point:
        self._runner.read(data.documents)
        cue_sentences = DEFAULT_CUE_SENTENCES if method.shows == "cue" else 0
        questions = self._searcher.search(data, top_k, self._seed, cue_sentences)
        return self.measure(curve, x, method, questions, gamma)

    def measure(
        self, curve: str, x: float, method: Method, questions: Sequence[Retrieved], gamma: float | None = None
    ) -> Point:
        records = self._runner.ask(questions, method, gamma)
        by_set: dict[str, list[Record]] = {}
        for record in records:
            by_set.setdefault(record.set_name, []).append(record)
        found = [[record.f1 for record in of_set if record.gold_retrieved] for of_set in by_set.values()]
        return Point(
            curve,
            x,
            method.name,
            stratified_interval(
                [[record.f1 for record in of_set] for of_set in by_set.values()],
                [[record.document_id for record in of_set] for of_set in by_set.values()],
            ),
            sum(record.gold_retrieved for record in records) / len(records),
            fmean(map(fmean, filter(None, found))) if any(found) else 0.0,
        )

    def over_length(self, others: Sequence[SourceDocument], lengths: Sequence[int] = LENGTHS) -> Iterator[Point]:
        """Documents of each length, cut into passages as at ingest. The text around each answer is cut or filled up."""
        for length in lengths:
            data = sized(self._data, length, others, self._seed)
            for method in ("regrad", "regrad_cue", "regrad_gold"):
                yield self._point("length", length, METHODS[method], data, self._top_k)

    def over_corpus(self, others: Sequence[SourceDocument], counts: Sequence[int]) -> Iterator[Point]:
        """Continual pre-training on ``count`` documents, and ReGrad on the same ones.

        The documents include those that answer the questions.
        """
        for count in counts:
            more = others[: max(0, count - len(self._data.documents))]
            data = self._data.merged(EvalData(tuple(more), ()))
            self._runner.pretrain(data.documents)
            for method in ("cpt", "regrad"):
                yield self._point("corpus", len(data.documents), METHODS[method], data, self._top_k)

    def over_history(self, data: EvalData, num_rounds: int = NUM_ROUNDS) -> Iterator[Point]:
        """Facts change and documents are deleted, round by round. data: invented facts.

        The ending "_stale" marks the share of outdated answers that is still given, "_deleted" the share of deleted
        ones. "cpt" is trained on all documents once, then on each change. It can't forget deleted documents.
        """
        for entry in history(data, num_rounds, self._seed):
            first = not entry.num_changes
            self._runner.pretrain(entry.data.documents if first else entry.changed, go_on=not first)
            for method in ("cpt", "regrad"):
                yield self._point("history", entry.num_changes, METHODS[method], entry.data, self._top_k)
                for ending, questions in (("stale", entry.stale), ("deleted", entry.deleted)):
                    if questions:
                        asked = EvalData(entry.data.documents, questions)
                        point = self._point("history", entry.num_changes, METHODS[method], asked, self._top_k)
                        yield replace(point, method=f"{method}_{ending}")


def sized(data: EvalData, num_tokens: int, others: Sequence[SourceDocument], seed: int) -> EvalData:
    """Documents of about ``num_tokens``, in passages, and the questions whose answer stands in their document.

    A longer document keeps the sentences around the answer's sentence. A shorter one gets sentences of other documents
    before and after its own. A question's documents are the passages with the answer's sentence. Each document has one
    question, so that the same questions are asked at every length.
    """
    rng = random.Random(f"regrad.evaluate.length.{seed}")
    filling = [sentence for other in others for sentence in split_sentences(other.text)]
    given = {document.id: document for document in data.documents}
    documents: dict[str, SourceDocument] = {}
    told: dict[str, str] = {}
    questions = []
    for question in data.questions:
        document = given[question.documents[0]]
        sentences = list(split_sentences(document.text))
        found = next((index for index, sentence in enumerate(sentences) if holds(sentence, question)), None)
        if found is None or document.id in documents:
            continue
        text = _window(sentences, found, num_tokens)
        if text == " ".join(sentences):
            text = _surrounded(text, num_tokens, filling, rng)
        documents[document.id] = replace(document, text=text)
        told[question.id] = plain_words(sentences[found])
        questions.append(replace(question, documents=(document.id,)))
    cut = in_passages(DataSplit(documents, tuple(questions)))
    asked = []
    for question in cut.questions:
        # Another sentence may hold the answer's words by chance, so the answer's whole sentence is searched for.
        # If the sentence was cut in two, both passages count.
        holding = [key for key in question.documents if told[question.id] in plain_words(cut.documents[key].text)]
        asked.append(replace(question, documents=tuple(holding) or question.documents))
    return EvalData(tuple(cut.documents.values()), tuple(asked))


def _window(sentences: Sequence[str], index: int, num_tokens: int) -> str:
    """The sentence and as many neighbours as fit, alternately after and before it."""
    low, high = index, index + 1
    total = count_tokens(sentences[index])
    grown = True
    while grown:
        grown = False
        if high < len(sentences) and total + count_tokens(sentences[high]) <= num_tokens:
            total += count_tokens(sentences[high])
            high, grown = high + 1, True
        if low and total + count_tokens(sentences[low - 1]) <= num_tokens:
            low, grown = low - 1, True
            total += count_tokens(sentences[low])
    return " ".join(sentences[low:high])


def _surrounded(text: str, num_tokens: int, sentences: Sequence[str], rng: random.Random) -> str:
    before: list[str] = []
    after: list[str] = []
    total = count_tokens(text)
    while total < num_tokens:
        sentence = rng.choice(sentences)
        total += count_tokens(sentence)
        (before if rng.random() < 0.5 else after).append(sentence)
    return " ".join((*before, text, *after))
