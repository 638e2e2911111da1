"""The documents of the load test, in namespaces of one bank, and the questions that they answer."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bank_service.errors import BankError, NotFoundError
from bank_service.values.sentences import split_sentences
from regrad_vllm.client import Bank, Query
from regrad_vllm.data.questions import EvalData, Question, SourceDocument, load_documents
from regrad_vllm.data.token_counts import count_tokens
from regrad_vllm.evaluate.fill_bank import ingest
from regrad_vllm.evaluate.growth import sized
from regrad_vllm.learner import Learner
from regrad_vllm.naming import digest_json

_TIMEOUT_MS = 60_000
_ASKED_AT_ONCE = 50  # documents


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of one namespace, with their questions."""

    name: str  # contains a digest of the documents, so that a later run finds equal documents
    data: EvalData
    passage_tokens: int  # 0: passages with their natural length
    # document → its passages, if documents were made to a length; None for natural passages
    parts: Mapping[str, tuple[str, ...]] | None

    @property
    def questions(self) -> tuple[Question, ...]:
        """The questions with answers."""
        return self.data.questions

    @property
    def queries(self) -> tuple[Question, ...]:
        """One query about each document, to measure cost.

        A document without a question is asked for by one of its sentences. These answers aren't scored.
        """
        names = {document.id: document.id for document in self.data.documents} | self.document_of
        asked = {names[question.documents[0]]: question for question in self.data.questions}
        for document in self.data.documents:
            sentence = next(split_sentences(document.text), document.text)
            about = Question(f"about {document.id}", sentence, ("-",), (document.id,), document.set_name)
            asked.setdefault(names[document.id], about)
        return tuple(asked.values())

    @property
    def document_of(self) -> dict[str, str]:
        """Passage → its document. Empty for natural passages."""
        return by_passage(self.parts or {})

    @property
    def mean_tokens(self) -> float:
        """The mean length of a document in tokens, estimated from its words."""
        total = sum(count_tokens(document.text) for document in self.data.documents)
        return total / (len(self.parts) if self.parts else len(self.data.documents))


@dataclass(frozen=True, slots=True)
class Ingested:
    """The cost of encoding a corpus."""

    num_documents: int
    seconds: float | None  # None if the bank had them all from an earlier run
    gradient_bytes: int  # all gradients together, as stored


def by_passage(parts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Passage → its document, from document → its passages."""
    return {part: document for document, own in parts.items() for part in own}


def natural(data: EvalData) -> Corpus:
    """The corpus of passages with their natural length."""
    return Corpus(_name("natural", data), data, 0, None)


def of_length(base: Corpus, num_tokens: int, num_documents: int, others: Sequence[SourceDocument], seed: int) -> Corpus:
    """The same questions with documents of about ``num_tokens``, cut around the answer or filled up with others."""
    chosen = list(base.questions)
    random.Random(f"regrad.load.length.{seed}").shuffle(chosen)
    asked: dict[str, Question] = {}
    for question in chosen:
        asked.setdefault(question.documents[0], question)
    data = sized(EvalData(base.data.documents, tuple(asked.values())), num_tokens, others, seed)
    parts: dict[str, tuple[str, ...]] = {}
    for document in data.documents:  # a passage's id is the document's id, with or without "#" and a number
        name = document.id if document.id in asked else document.id.rpartition("#")[0]
        parts[name] = (*parts.get(name, ()), document.id)
    kept = dict(list(parts.items())[:num_documents])
    ids = {part for own in kept.values() for part in own}
    documents = tuple(document for document in data.documents if document.id in ids)
    questions = tuple(question for question in data.questions if question.documents[0] in ids)
    made = EvalData(documents, questions)
    return Corpus(_name(f"tokens-{num_tokens}", made), made, num_tokens, kept)


def _name(kind: str, data: EvalData) -> str:
    return f"{kind}-" + digest_json([[document.id, document.title, document.text] for document in data.documents])[:12]


@contextmanager
def ingested(corpus: Corpus, bank: str, learner: Learner, *, keep: bool) -> Iterator[Ingested]:
    """Stores a corpus in its namespace for the time of the context. RuntimeError if the bank refuses it, BankError.

    At the end the new documents are deleted, also after a failed ingest. ``keep`` leaves them in the bank.
    """
    ids = [document.id for document in corpus.data.documents]
    try:
        _stored_bytes(bank, learner, corpus.name, ids)
        is_there = True
    except NotFoundError:
        is_there = False
    try:
        start = time.perf_counter()
        ingest(corpus.data.documents, bank, corpus.name)
        seconds = None if is_there else time.perf_counter() - start
        yield Ingested(len(ids), seconds, _stored_bytes(bank, learner, corpus.name, ids))
    finally:
        if not keep and not is_there:
            _remove(corpus, bank)


def _remove(corpus: Corpus, bank: str) -> None:
    """Deletes a corpus's documents. An error is only reported, because the measurement is complete."""
    with Bank(bank) as client:
        for document in corpus.data.documents:
            try:
                client.delete(document.id, namespace=corpus.name)
            except NotFoundError:
                continue
            except BankError as error:
                sys.stdout.write(f"namespace {corpus.name} of the bank keeps documents: {error.message}\n")
                return


def _stored_bytes(address: str, learner: Learner, namespace: str, ids: Sequence[str]) -> int:
    total = 0
    with Bank(address, spec=learner.spec, timeout_ms=_TIMEOUT_MS) as bank:
        for start in range(0, len(ids), _ASKED_AT_ONCE):
            query = Query(namespace=namespace, document_ids=tuple(ids[start : start + _ASKED_AT_ONCE]), newest=True)
            total += sum(hit.gradient_bytes for hit in bank.query(query).hits)
    return total


def filling(folder: Path, split: str) -> list[SourceDocument]:
    """Texts to lengthen documents with: the data's haystack, or the split's own documents if it has none."""
    try:
        return list(load_documents(folder, "haystack").values())
    except FileNotFoundError:
        return list(load_documents(folder, split).values())
