"""Asks the bank once for the hits of each question, for all methods, and chooses the documents of the controls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from regrad_vllm.client import AsyncBank, Query
from regrad_vllm.data.questions import EvalData, Question
from regrad_vllm.evaluate.methods import Method
from regrad_vllm.learner import Learner


@dataclass(frozen=True, slots=True)
class FoundDocument:
    """A retrieved document."""

    id: str
    score: float  # cosine
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A question and the documents that the methods use for it."""

    question: Question
    hits: tuple[FoundDocument, ...]  # best first
    cue: tuple[tuple[str, str], ...]  # (title, sentence) of the hits' sentences nearest to the question, nearest first
    # For the controls. None or empty if no other question or document fits.
    wrong_query: str | None  # another question of the same set, whose hits don't answer this one
    wrong_hits: tuple[FoundDocument, ...]
    random_id: str | None  # a document that doesn't answer it

    @property
    def gold_retrieved(self) -> bool:
        return not {hit.id for hit in self.hits}.isdisjoint(self.question.documents)


async def retrieve(
    bank_address: str, namespace: str, data: EvalData, learner: Learner, top_k: int, seed: int, cue_sentences: int = 0
) -> list[Retrieved]:
    """Asks the bank with the same requests as the server. BankError."""
    hits, cues = [], []
    async with AsyncBank(bank_address, spec=learner.spec, timeout_ms=60_000) as bank:
        for question in data.questions:
            query = Query(question.question, namespace=namespace, top_k=top_k, with_text=True, with_cue=cue_sentences)
            answer = await bank.query(query)
            hits.append(tuple(FoundDocument(hit.id, hit.score, hit.title, hit.text) for hit in answer.hits))
            cues.append(tuple((hit.title, sentence.text) for hit, sentence in answer.cue))
    return with_controls(data, hits, random.Random(f"regrad.evaluate.controls.{seed}"), cues)


def with_controls(
    data: EvalData,
    hits: Sequence[tuple[FoundDocument, ...]],
    rng: random.Random,
    cues: Sequence[tuple[tuple[str, str], ...]] = (),
) -> list[Retrieved]:
    """Adds the documents of the controls, if there are any. ``cues``: of each question."""
    ids = [document.id for document in data.documents]
    retrieved = []
    for own, (question, found) in enumerate(zip(data.questions, hits, strict=True)):
        candidates = [
            index
            for index, other in enumerate(data.questions)
            if index != own
            and other.set_name == question.set_name
            and {hit.id for hit in hits[index]}.isdisjoint(question.documents)
        ]
        others = [key for key in ids if key not in question.documents]
        wrong = rng.choice(candidates) if candidates else None
        wrong_query, wrong_hits = (None, ()) if wrong is None else (data.questions[wrong].question, hits[wrong])
        random_id = rng.choice(others) if others else None
        retrieved.append(Retrieved(question, found, cues[own] if cues else (), wrong_query, wrong_hits, random_id))
    return retrieved


def check_controls(questions: Sequence[Retrieved], methods: Sequence[Method]) -> None:
    """ValueError if a method is a control and a question has no document for it."""
    adapters = {method.adapter for method in methods}
    for asked in questions:
        if ("wrong" in adapters and asked.wrong_query is None) or ("random" in adapters and asked.random_id is None):
            raise ValueError(
                f"the controls need documents that don't answer {asked.question.question!r}: every question of set "
                f"{asked.question.set_name!r} finds its document; take more documents, a smaller --top-k, or leave "
                "regrad_wrong and regrad_random out of --methods"
            )
