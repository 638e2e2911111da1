"""The ways to ask a question that the demo compares: they differ in what the prompt gets, and in the adapter."""

from __future__ import annotations

import asyncio
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
NUM_TIMED = 5  # questions


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask. ``regrad`` None: the base model answers."""

    name: str
    title: str
    regrad: Mapping[str, Any] | None = None
    shows_document: bool = False  # the client itself puts the best document into the prompt


WAYS = (
    Way("base", "base model"),
    Way("rag", "RAG: base model, document in the prompt", shows_document=True),
    Way("blind", "ReGrad, nothing in the prompt", {"mode": "blind"}),
    Way("cue", "ReGrad, two sentences (the default)", {}),
    Way("icl", "ReGrad, document in the prompt", {"mode": "icl"}),
)


@dataclass(frozen=True, slots=True)
class Told:
    """The answers of one way, and their cost."""

    answers: tuple[ChatAnswer, ...]  # in the order of the questions
    milliseconds: float  # median of an answer asked for alone

    @property
    def prompt_tokens(self) -> float:
        """The mean length of a prompt."""
        return mean(answer.prompt_tokens for answer in self.answers)

    def right(self, questions: Sequence[QuizQuestion], *, invented: bool) -> int:
        """The number of right answers to one kind of questions."""
        pairs = zip(questions, self.answers, strict=True)
        return sum(question.is_answered_by(answer.text) for question, answer in pairs if question.invented is invented)


def ask_every_way(
    url: str, bank: str, namespace: str, prompts: Prompts, questions: Sequence[QuizQuestion]
) -> dict[str, Told]:
    """Asks every question in every way, all at once. Then asks a few one at a time, for their time. AskError,
    ServerError."""
    with Bank(bank) as client:
        found = [client.query(Query(one.text, namespace=namespace, top_k=1, with_text=True)) for one in questions]
    texts = [[prompts.render_document(hit.title, hit.text) for hit in result.hits] for result in found]

    def request(way: Way, place: int) -> ChatRequest:
        text = questions[place].text
        content = prompts.render_icl(text, texts[place]) if way.shows_document else text
        return ChatRequest(BASE if way.regrad is None else REGRAD, content, way.regrad)

    everything = [request(way, place) for way in WAYS for place in range(len(questions))]
    answers = asyncio.run(ask_all(url, prompts.system, everything))
    timed: dict[str, list[float]] = {way.name: [] for way in WAYS}
    for place in range(min(NUM_TIMED, len(questions))):
        for way in WAYS:
            (alone,) = asyncio.run(ask_all(url, prompts.system, [request(way, place)], progress=False))
            timed[way.name].append(1000 * alone.seconds)
    n = len(questions)
    return {
        way.name: Told(tuple(answers[n * index : n * (index + 1)]), median(timed[way.name]))
        for index, way in enumerate(WAYS)
    }
