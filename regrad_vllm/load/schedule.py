"""The schedule of a run: conditions with their contenders, and the questions of each cell."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regrad_vllm.data.questions import Question
from regrad_vllm.load.comparison import Contender, LoadCondition, Phase, fair_rival
from regrad_vllm.load.corpora import Corpus
from regrad_vllm.load.traffic import Arrival, Popular, Popularity, TraceEntry, in_own_words

# Popularity and prefix caching. The first one is the main comparison, with every contender.
CONDITIONS: Mapping[str, tuple[Popularity, bool]] = {
    "zipf-cached": ("zipf", True),
    "zipf-uncached": ("zipf", False),
    "uniform-cached": ("uniform", True),
    "uniform-uncached": ("uniform", False),
}
_CURVE_REQUESTS = 2  # times the number of requests at a time
_FEWEST_REQUESTS = 4
_WARM_UP_TOKENS = 4
Planned = tuple[LoadCondition, Sequence[str]]  # a condition and its contenders


@dataclass(frozen=True, slots=True)
class GrowthPoint:
    """A point of the growth curve: the documents of a request, and the tokens of each."""

    top_k: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> GrowthPoint:
        """Parses "3x150". argparse shows the error."""
        found = re.fullmatch(r"(\d{1,3})x(\d{1,6})", text)
        if found is None or not int(found[1]) or not int(found[2]):
            raise argparse.ArgumentTypeError(f"must be K x TOKENS, such as 3x150, got {text!r}")
        return cls(int(found[1]), int(found[2]))


class Schedule:
    """All conditions of a run."""

    def __init__(
        self,
        args: argparse.Namespace,
        contenders: Sequence[str],
        corpora: Sequence[Corpus],
        trace: Sequence[TraceEntry],
    ) -> None:
        self._args = args
        self._contenders = tuple(contenders)
        self._natural, *self._grown = corpora
        self._corpora = {corpus.name: corpus for corpus in corpora}
        self._trace = trace
        self._popular = {
            (corpus.name, popularity): Popular(corpus.queries, popularity, args.seed)
            for corpus in corpora
            for popularity in ("zipf", "uniform")
        }

    def warm_ups(self) -> list[Planned]:
        condition = self._condition(
            "warm-up", self._natural.name, self._args.top_k, "uniform", True, self._closed(4), 4
        )
        return [(condition, self._contenders)]

    def costs(self) -> list[Planned]:
        args = self._args
        corpus, closed = self._natural.name, self._closed(args.concurrency)
        return [
            (
                self._condition("cost", corpus, args.top_k, *CONDITIONS[name], closed, args.requests),
                self._contenders if index == 0 else self._among(args.condition_contenders),
            )
            for index, name in enumerate(args.conditions)
        ]

    def curves(self) -> list[Planned]:
        args = self._args
        arrivals = [
            (self._closed(number), max(_FEWEST_REQUESTS, _CURVE_REQUESTS * number))
            for number in args.curve
            if number != args.concurrency  # the main comparison has that point already
        ]
        arrivals += [(Arrival("poisson", rate), args.requests) for rate in args.rates]
        if self._trace:
            arrivals.append((Arrival("trace", args.trace_speed), len(self._trace)))
        names = self._among(args.curve_contenders)
        return [
            (
                self._condition(
                    "curve", self._natural.name, args.top_k, *CONDITIONS[args.conditions[0]], arrival, number
                ),
                names,
            )
            for arrival, number in arrivals
        ]

    def growths(self) -> list[Planned]:
        """The conditions of the growth curves. They have no prefix caching, because the cost of all tokens counts."""
        args = self._args
        names = self._among(args.growth_contenders)
        at_a_time = max(1, args.concurrency // 2)  # long prompts take more time
        closed, number = self._closed(at_a_time), 2 * at_a_time
        return [
            (
                self._condition("growth", corpus.name, point.top_k, "uniform", False, closed, number, point.tokens),
                names,
            )
            for point in args.growth
            for corpus in self._grown
            if corpus.passage_tokens == point.tokens
        ]

    def qualities(self) -> list[Planned]:
        number = min(self._args.quality_questions, len(self._natural.questions))
        if not number:
            return []
        closed = self._closed(self._args.concurrency)
        condition = self._condition("quality", self._natural.name, self._args.top_k, "uniform", True, closed, number)
        return [(condition, self._contenders)]

    def questions(self, condition: LoadCondition, contender: Contender, repeat: int) -> list[Question]:
        """The questions of a cell. All contenders get the same ones under the same condition and repeat.

        A contender that answers one at a time gets only the first few in the phase "cost". Its rate doesn't depend on
        their number.
        """
        asked = self._questions(condition, repeat)
        few = contender.engine == "alone" and condition.phase != "quality"
        return asked[: self._args.alone_requests] if few else asked

    def _questions(self, condition: LoadCondition, repeat: int) -> list[Question]:
        numbers = random.Random(f"regrad.load.numbers.{self._args.seed}.{condition.key}.{repeat}")
        if condition.arrival.kind == "trace":
            asked = [
                Question(f"trace-{number}", entry.question, ("-",), ("-",), "trace")
                for number, entry in enumerate(self._trace)
            ]
            return in_own_words(asked, numbers)
        # The seed leaves prefix caching out, so both settings ask about the same documents.
        rng = random.Random(
            f"regrad.load.{self._args.seed}.{condition.phase}.{condition.corpus}.{condition.top_k}."
            f"{condition.popularity}.{condition.arrival.value}.{repeat}"
        )
        if condition.phase == "quality":  # each question once and unchanged
            return rng.sample(self._corpora[condition.corpus].questions, condition.num_requests)
        popular = self._popular[condition.corpus, condition.popularity]
        return in_own_words(popular.draw(condition.num_requests, rng), numbers)

    def _among(self, names: Sequence[str] | None) -> list[str]:
        """The named contenders that take part in the run. Without names: ReGrad and its rival."""
        wanted = names if names is not None else (fair_rival(self._contenders), "regrad")
        return [name for name in self._contenders if name in wanted]

    def _condition(
        self,
        phase: Phase,
        corpus: str,
        top_k: int,
        popularity: Popularity,
        prefix_cache: bool,
        arrival: Arrival,
        num_requests: int,
        passage_tokens: int = 0,
    ) -> LoadCondition:
        lengths = {"warm-up": _WARM_UP_TOKENS, "quality": 0}
        output_tokens = lengths.get(phase, self._args.output_tokens)
        return LoadCondition(
            phase, corpus, passage_tokens, top_k, popularity, prefix_cache, arrival, output_tokens, num_requests
        )

    def _closed(self, number: int) -> Arrival:
        return Arrival("closed", number)


def interleaved(
    conditions: Sequence[tuple[LoadCondition, Sequence[str]]], repeats: int, seed: int
) -> list[tuple[LoadCondition, str, int]]:
    """(condition, contender, repeat) in the order of the run.

    Each repeat has all contenders in a new order, so that no contender always follows the same other one.
    """
    order = []
    for repeat in range(repeats):
        for condition, names in conditions:
            shuffled = list(names)
            random.Random(f"regrad.load.order.{seed}.{condition.key}.{repeat}").shuffle(shuffled)
            order += [(condition, name, repeat) for name in shuffled]
    return order
