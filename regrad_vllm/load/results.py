"""A run's folder → results. The folder holds what was measured; all figures are computed from it here, any time again.

run.json         what was run, on what, with which settings; conditions, corpora, sizes
questions.json   what was asked, with the right answers
requests.jsonl   a line for each request
cells.jsonl      a line for each cell
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regrad_vllm.evaluate.metrics import exact_match, score
from regrad_vllm.evaluate.report import rounded
from regrad_vllm.load.arrivals import Arrival
from regrad_vllm.load.cells import CellLine, Condition, RequestLine
from regrad_vllm.load.contenders import CONTENDERS
from regrad_vllm.load.figures import Figures, Limits, Quality, Spread, break_even, figures, quality, rates, ratio, slope
from regrad_vllm.load.popularity import Reuse, reuse

RUN, QUESTIONS, REQUESTS, CELLS = "run.json", "questions.json", "requests.jsonl", "cells.jsonl"


@dataclass(frozen=True, slots=True)
class Group:
    """The contenders under one condition."""

    condition: Condition
    figures: Mapping[str, Figures]  # by contender, in the order of CONTENDERS
    rates: Mapping[str, Mapping[int, float]]  # requests/s by contender and repeat
    reuse: Reuse | None  # of what was retrieved; None where nothing was
    same_documents: float | None  # share of the answers with the documents that another contender's answer had

    def ratio(self, contender: str, rival: str) -> Spread | None:
        """Requests/s over another's, paired; None where one wasn't asked, or not all of its requests were completed."""
        if contender not in self.rates or rival not in self.rates:
            return None
        if any(self.figures[name].failed + self.figures[name].incomplete for name in (contender, rival)):
            return None
        if not set(self.rates[contender]) & set(self.rates[rival]):
            return None
        return ratio(self.rates[contender], self.rates[rival])


@dataclass(frozen=True, slots=True)
class Results:
    run: Mapping[str, Any]
    groups: Sequence[Group]
    quality: Mapping[str, Quality]  # by contender
    lines: Mapping[tuple[str, str], Sequence[RequestLine]]  # each request, by condition and contender

    @property
    def main(self) -> Group:
        """What the last line tells: the first cost condition."""
        return self.of("cost")[0]

    @property
    def curve(self) -> list[Group]:
        """By arrival; the main comparison is one of them."""
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

    def growth(self) -> dict[str, list[tuple[float, Spread]]]:
        """Contender → (tokens of the documents, requests/s) of each point where all was completed.

        The tokens are those that the prompts of RAG + φ* have more than ReGrad's; where one of the two wasn't asked,
        the documents' nominal length.
        """
        points: dict[str, list[tuple[float, Spread]]] = {}
        for group in self.of("growth"):
            found = group.figures
            tokens = float(group.condition.top_k * group.condition.passage_tokens)
            if {"regrad", "rag_learner"} <= set(found) and found["rag_learner"].completed and found["regrad"].completed:
                tokens = found["rag_learner"].prompt_tokens - found["regrad"].prompt_tokens
            for name, own in found.items():
                if own.completed and not own.failed + own.incomplete:
                    points.setdefault(name, []).append((tokens, own.requests_s))
        return {name: sorted(own, key=lambda point: point[0]) for name, own in points.items()}

    def slopes(self) -> dict[str, tuple[float, float]]:
        """Contender → (s a request without documents, s a token of documents): the line through its growth."""
        return {
            name: slope([(x, 1 / rate.median) for x, rate in own])
            for name, own in self.growth().items()
            if len({x for x, _ in own}) > 1
        }

    def break_even(self) -> float | None:
        """Requests a document after which ReGrad's encoding has paid off against RAG + φ*."""
        found = self.main.figures
        if not {"regrad", "rag_learner"} <= set(found) or not self.run["corpora"]:
            return None
        corpus = self.run["corpora"][0]
        if corpus["seconds"] is None:
            return None
        own, rival = found["regrad"].requests_s.median, found["rag_learner"].requests_s.median
        return break_even(corpus["seconds"] / corpus["documents"], own, rival)

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
        for rival in ("rag_learner", "base"):
            found_ratio = self.main.ratio("regrad", rival)
            line[f"regrad_over_{rival}"] = found_ratio.median if found_ratio else None
        return rounded(line)

    def plain(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return rounded(
            {
                "run": self.run,
                "groups": [
                    {**asdict(group), "key": group.condition.key, "regrad_over": _ratios(group)}
                    for group in self.groups
                ],
                "quality": {name: asdict(found) for name, found in self.quality.items()},
                "growth_s": {name: {"request": a, "token": b} for name, (a, b) in self.slopes().items()},
                "break_even_requests_a_document": self.break_even(),
                "last_line": self.last_line(),
            }
        )


def load(folder: Path) -> Results:
    """Reads a run's folder, also one whose run was cut short. FileNotFoundError; ValueError where no cost was
    measured."""
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
    condition: Condition, own: Mapping[str, tuple[Sequence[RequestLine], Sequence[CellLine]]], limits: Limits
) -> Group:
    retrieving = [
        {(line.repeat, line.index): frozenset(line.documents) for line in lines if line.status == "completed"}
        for name, (lines, _) in own.items()
        if CONTENDERS[name].retrieves
    ]
    most = max(retrieving, key=len, default={})  # one of those that were asked everything
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
    conditions: Mapping[str, Condition],
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


def _ratios(group: Group) -> dict[str, Any]:
    return {
        rival: asdict(found)
        for rival in group.figures
        if rival != "regrad" and (found := group.ratio("regrad", rival)) is not None
    }


def _condition(value: Mapping[str, Any]) -> Condition:
    return Condition(**{**value, "arrival": Arrival(**value["arrival"])})


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last one may have been cut short."""
    found = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found
