"""A run's folder → results. The folder holds the measurements, and all figures are computed from them here.

- run.json: the run's machine and settings, conditions, corpora, sizes.
- questions.json: the questions, with the right answers.
- requests.jsonl: a line for each request.
- cells.jsonl: a line for each cell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regrad_vllm.evaluate.scoring import exact_match, score
from regrad_vllm.load.comparison import CONTENDERS, CellLine, LoadCondition, RequestLine, fair_rival
from regrad_vllm.load.figures import Figures, Limits, Quality, break_even, figures, quality, rates, ratio, slope
from regrad_vllm.load.traffic import Arrival, Reuse, reuse
from regrad_vllm.reporting.intervals import Spread, rounded

_FEWEST_REPEATS, _FEWEST_REQUESTS = 3, 20  # a comparison needs them for a conclusion
_OURS = ("regrad", "regrad_cue")
# Those of the last line.
_RATIOS = (
    ("regrad", "rag_learner"), ("regrad", "rag"), ("regrad", "base"),
    ("regrad_cue", "rag_learner"), ("regrad_cue", "ft_rag_sentence"),
)  # fmt: skip
RUN, QUESTIONS, REQUESTS, CELLS = "run.json", "questions.json", "requests.jsonl", "cells.jsonl"


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of all contenders under one condition."""

    condition: LoadCondition
    figures: Mapping[str, Figures]  # by contender, in the order of CONTENDERS
    rates: Mapping[str, Mapping[int, float]]  # requests/s by contender and repeat
    reuse: Reuse | None  # of the retrieved documents; None if there were none
    same_documents: float | None  # share of the answers that used the same documents as another contender's answer

    @property
    def rival(self) -> str | None:
        """The RAG contender that ReGrad is compared with."""
        return fair_rival(self.figures)

    def ratio(self, contender: str, rival: str | None) -> Spread | None:
        """The ratio of the two rates (requests/s), paired by repeat.

        None if one of the two wasn't asked or didn't complete all its requests.
        """
        if rival is None or contender not in self.rates or rival not in self.rates:
            return None
        if any(self.figures[name].failed + self.figures[name].incomplete for name in (contender, rival)):
            return None
        if not set(self.rates[contender]) & set(self.rates[rival]):
            return None
        return ratio(self.rates[contender], self.rates[rival])


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a request as a line over the tokens of its documents. Each repeat has a line of its own."""

    request: Spread  # seconds of a request without documents
    token: Spread  # seconds for each token


@dataclass(frozen=True, slots=True)
class Results:
    run: Mapping[str, Any]
    groups: Sequence[Group]
    quality: Mapping[str, Quality]  # by contender
    lines: Mapping[tuple[str, str], Sequence[RequestLine]]  # each request, by condition and contender

    @property
    def main(self) -> Group:
        """The main comparison: the first condition of the phase "cost". The command's last line reports it."""
        return self.of("cost")[0]

    @property
    def curve(self) -> list[Group]:
        """The groups in order of arrival. The main comparison is one of them."""
        groups = [self.main, *self.of("curve")]
        return sorted(groups, key=lambda group: (group.condition.arrival.kind, group.condition.arrival.value))

    @property
    def main_completed(self) -> dict[str, list[RequestLine]]:
        """The main comparison's completed requests, by contender."""
        key = self.main.condition.key
        return {
            name: [line for line in self.lines[key, name] if line.status == "completed"] for name in self.main.figures
        }

    def of(self, phase: str) -> list[Group]:
        return [group for group in self.groups if group.condition.phase == phase]

    def growth(self) -> dict[str, list[tuple[float, Mapping[int, float]]]]:
        """Contender → (tokens of the documents, requests/s by repeat) for each point with all requests completed.

        The tokens are the difference between RAG's prompt and ReGrad's prompt. If one of the two wasn't asked, they are
        the nominal length of the documents.
        """
        points: dict[str, list[tuple[float, Mapping[int, float]]]] = {}
        for group in self.of("growth"):
            found, rival = group.figures, group.rival
            tokens = float(group.condition.top_k * group.condition.passage_tokens)
            if rival and "regrad" in found and found[rival].completed and found["regrad"].completed:
                tokens = found[rival].prompt_tokens - found["regrad"].prompt_tokens
            for name, own in found.items():
                if own.completed and not own.failed + own.incomplete:
                    points.setdefault(name, []).append((tokens, group.rates[name]))
        return {name: sorted(own, key=lambda point: point[0]) for name, own in points.items()}

    def slopes(self) -> dict[str, Line]:
        """The line through the points of each contender that has at least three."""
        lines = {}
        for name, points in self.growth().items():
            repeats = set.intersection(*(set(rates) for _, rates in points))
            try:
                through = [slope([(x, 1 / rates[repeat]) for x, rates in points]) for repeat in sorted(repeats)]
            except ValueError:  # too few points
                continue
            if through:
                lines[name] = Line(Spread.of([a for a, _ in through]), Spread.of([b for _, b in through]))
        return lines

    @property
    def is_small(self) -> bool:
        """Whether the main comparison is too small for a conclusion."""
        own = [
            (found.completed + found.failed + found.incomplete, found.requests_s.repeats)
            for name, found in self.main.figures.items()
            if CONTENDERS[name].engine != "alone"
        ]
        return any(repeats < _FEWEST_REPEATS or asked < _FEWEST_REQUESTS for asked, repeats in own)

    def break_even(self) -> float | None:
        """The number of requests per document after which ReGrad's encoding is paid off against its RAG rival."""
        found, rival = self.main.figures, self.main.rival
        if rival is None or "regrad" not in found or not self.run["corpora"]:
            return None
        corpus = self.run["corpora"][0]
        if corpus["seconds"] is None:
            return None
        rates = found["regrad"].requests_s.median, found[rival].requests_s.median
        return break_even(corpus["seconds"] / corpus["documents"], *rates)

    def last_line(self) -> dict[str, Any]:
        line: dict[str, Any] = {}
        for name, found in self.main.figures.items():
            em = self.quality.get(name)
            line[name] = {
                "requests_s": found.requests_s.median,
                "ttft_p50_ms": found.ttft_ms.get(50),
                "itl_p50_ms": found.itl_ms.get(50),
                "failed": found.failed + found.incomplete,
                "em": em.em.mean if em else None,
            }
        for own, rival in _RATIOS:
            found_ratio = self.main.ratio(own, rival)
            line[f"{own}_over_{rival}"] = found_ratio.median if found_ratio else None
        return rounded(line)

    def plain(self) -> dict[str, Any]:
        """All results as plain data for JSON."""
        return rounded(
            {
                "run": self.run,
                "groups": [
                    {
                        **asdict(group),
                        "key": group.condition.key,
                        **{f"{own}_over": _ratios(group, own) for own in _OURS},
                    }
                    for group in self.groups
                ],
                "quality": {name: asdict(found) for name, found in self.quality.items()},
                "growth_s": {name: asdict(line) for name, line in self.slopes().items()},
                "break_even_requests_a_document": self.break_even(),
                "last_line": self.last_line(),
            }
        )


def load(folder: Path) -> Results:
    """Reads a run's folder, even of an interrupted run. FileNotFoundError; ValueError if no cost was measured."""
    run = json.loads((folder / RUN).read_text("utf-8"))
    conditions = {key: _condition(value) for key, value in run["conditions"].items()}
    limits = Limits(**run["limits"])
    lines = _requests(folder)
    cells: dict[tuple[str, str], list[CellLine]] = {}
    for value in _lines(folder / CELLS):
        cell = CellLine(**value)
        cells.setdefault((cell.condition, cell.contender), []).append(cell)
    groups = []
    for key, condition in conditions.items():
        own = {name: (lines[key, name], cells[key, name]) for name in CONTENDERS if (key, name) in cells}
        if own:
            groups.append(_group(condition, own, limits))
    results = Results(run, groups, _quality(folder, conditions, lines), lines)
    if not results.of("cost"):
        raise ValueError(f"{folder} must hold at least one cell of phase cost; the run was cut short before it")
    return results


def _requests(folder: Path) -> dict[tuple[str, str], list[RequestLine]]:
    lines: dict[tuple[str, str], list[RequestLine]] = {}
    for value in _lines(folder / REQUESTS):
        line = RequestLine(**{**value, "event_ms": tuple(value["event_ms"]), "documents": tuple(value["documents"])})
        lines.setdefault((line.condition, line.contender), []).append(line)
    return lines


def _group(
    condition: LoadCondition, own: Mapping[str, tuple[Sequence[RequestLine], Sequence[CellLine]]], limits: Limits
) -> Group:
    retrieving = [
        {(line.repeat, line.index): frozenset(line.documents) for line in lines if line.status == "completed"}
        for name, (lines, _) in own.items()
        if CONTENDERS[name].retrieves
    ]
    most = max(retrieving, key=len, default={})  # a contender with the most answers
    asked = [(found[key], most[key]) for found in retrieving for key in found if key in most]
    return Group(
        condition=condition,
        figures={name: figures(*measured, limits) for name, measured in own.items()},
        rates={name: rates(*measured) for name, measured in own.items()},
        reuse=reuse([tuple(most[key]) for key in sorted(most)]) if most else None,
        same_documents=sum(one == other for one, other in asked) / len(asked) if asked else None,
    )


def _quality(
    folder: Path,
    conditions: Mapping[str, LoadCondition],
    lines: Mapping[tuple[str, str], Sequence[RequestLine]],
) -> dict[str, Quality]:
    asked = json.loads((folder / QUESTIONS).read_text("utf-8"))
    found = {}
    for (key, name), own in lines.items():
        if conditions[key].phase != "quality":
            continue
        scores = []
        for line in own:
            question = asked[line.question_id]
            text = line.text if line.status == "completed" else ""
            em, f1 = exact_match(text, question["answers"]), score(text, question["answers"], question["kind"])
            scores.append((em, f1, question["document"]))
        found[name] = quality(scores)
    return {name: found[name] for name in CONTENDERS if name in found}


def _ratios(group: Group, own: str) -> dict[str, Any]:
    return {
        rival: asdict(found)
        for rival in group.figures
        if rival != own and (found := group.ratio(own, rival)) is not None
    }


def _condition(value: Mapping[str, Any]) -> LoadCondition:
    return LoadCondition(**{**value, "arrival": Arrival(**value["arrival"])})


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file. An incomplete last line is ignored."""
    found = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found
