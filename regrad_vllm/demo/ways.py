"""The ways to ask a question that the demo compares: they differ in what the prompt gets, and in the adapter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from regrad_vllm.client import Bank, Query
from regrad_vllm.demo.chat import ChatAnswer, ChatRequest, ask_all
from regrad_vllm.demo.quiz import QuizQuestion
from regrad_vllm.prompts import Prompts

BASE, REGRAD = "smollm2", "smollm2-regrad"
DEFAULT_WAY = "cue"  # the server's mode where nothing else is said
NUM_TIMED = 5  # questions of each way


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask. ``regrad`` None: the base model answers."""

    name: str
    title: str
    regrad: Mapping[str, Any] | None = None
    shows_document: bool = False  # the client itself puts the best document into the prompt


WAYS = (
    Way("base", "base model"),
    Way("rag", "RAG, untuned: document in the prompt", shows_document=True),
    Way("blind", "ReGrad, nothing in the prompt", {"mode": "blind"}),
    Way("cue", "ReGrad, two sentences (the default)", {"mode": "cue"}),
    Way("icl", "ReGrad, document in the prompt", {"mode": "icl"}),
)


@dataclass(frozen=True, slots=True)
class Told:
    """The answers of one way, and their cost."""

    answers: tuple[ChatAnswer, ...]  # in the order of the questions
    milliseconds: float  # median of a few answers asked for alone, with the search for the document

    @property
    def prompt_tokens(self) -> float:
        """The mean length of a prompt."""
        return mean(answer.prompt_tokens for answer in self.answers)

    def right(self, questions: Sequence[QuizQuestion], *, invented: bool | None = None) -> int:
        """The number of right answers to one kind of questions; None: to all."""
        return sum(
            question.is_answered_by(answer.text)
            for question, answer in zip(questions, self.answers, strict=True)
            if invented in (None, question.invented)
        )


def ask_every_way(
    url: str, bank: str, namespace: str, prompts: Prompts, questions: Sequence[QuizQuestion]
) -> dict[str, Told]:
    """Asks a few questions one at a time, each way others, so that no cache has them. Then asks all at once. AskError,
    ServerError."""
    with Bank(bank) as client:

        def request(way: Way, question: QuizQuestion) -> ChatRequest:
            content = question.text
            if way.shows_document:
                hits = client.query(Query(content, namespace=namespace, top_k=1, with_text=True)).hits
                content = prompts.render_icl(content, [prompts.render_document(hit.title, hit.text) for hit in hits])
            return ChatRequest(BASE if way.regrad is None else REGRAD, content, way.regrad)

        timed: dict[str, list[float]] = {way.name: [] for way in WAYS}
        for place, question in enumerate(questions[: NUM_TIMED * len(WAYS)]):
            way = WAYS[place % len(WAYS)]
            begun = time.monotonic()
            asyncio.run(ask_all(url, prompts.system, [request(way, question)], progress=False))
            timed[way.name].append(1000 * (time.monotonic() - begun))
        everything = [request(way, question) for way in WAYS for question in questions]
    answers = asyncio.run(ask_all(url, prompts.system, everything))
    n = len(questions)
    return {
        way.name: Told(tuple(answers[n * index : n * (index + 1)]), median(timed[way.name]))
        for index, way in enumerate(WAYS)
    }
