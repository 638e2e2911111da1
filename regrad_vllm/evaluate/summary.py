"""Records → figures for each set and over all sets, with bootstrap intervals and paired differences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from regrad_vllm.evaluate.answers import Record
from regrad_vllm.evaluate.methods import COMPARISONS, METHODS
from regrad_vllm.reporting.intervals import Interval, bootstrap_interval, rounded, stratified_interval


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one set. Unanswered questions count as wrong."""

    em: Interval
    f1: Interval
    failed: int
    answer_nll: Interval | None  # over the questions that have a likelihood under every method; None: not asked for


@dataclass(frozen=True, slots=True)
class SetReport:
    name: str
    num_questions: int
    recall: float  # share of the questions whose document was among the retrieved
    rows: Mapping[str, Row]  # by method


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference in F1 between two methods, paired by question; the mean over the sets."""

    method: str
    other: str
    difference: Interval
    by_set: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class Report:
    methods: tuple[str, ...]
    sets: tuple[SetReport, ...]
    overall: Mapping[str, Interval]  # method → F1, the mean over the sets
    comparisons: tuple[Comparison, ...]

    @property
    def num_questions(self) -> int:
        return sum(entry.num_questions for entry in self.sets)

    def figures(self) -> dict[str, object]:
        """The figures of the command's last line."""
        plain = {
            method: {"mean_f1": interval.mean, "low": interval.low, "high": interval.high}
            for method, interval in self.overall.items()
        }
        return rounded({**plain, "questions": self.num_questions})

    def plain(self) -> dict[str, object]:
        """The whole report as plain data for JSON."""
        return rounded(asdict(self))


def summarise(records: Sequence[Record]) -> Report:
    """The report on these records.

    ValueError for no records, or if a method lacks a question that another method was asked.
    """
    methods = tuple(name for name in METHODS if any(record.method == name for record in records))
    by_set: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        of_set = by_set.setdefault(record.set_name, {})
        of_set.setdefault(record.method, {})[record.question_id] = record
    for name, found in by_set.items():
        if len({frozenset(of_method) for of_method in found.values()}) > 1 or len(found) != len(methods):
            raise ValueError(f"every method must have been asked the same questions; in set {name!r} they differ")
    sets = tuple(_set_report(name, found, methods) for name, found in by_set.items())
    overall = {
        method: stratified_interval(*zip(*(_f1(found[method].values()) for found in by_set.values()), strict=True))
        for method in methods
    }
    compared = tuple(_compare(by_set, *pair) for pair in COMPARISONS if set(pair) <= set(methods))
    return Report(methods, sets, overall, compared)


def _set_report(name: str, found: Mapping[str, Mapping[str, Record]], methods: Sequence[str]) -> SetReport:
    rows = {}
    scored = [key for key in found[methods[0]] if all(found[method][key].answer_nll is not None for method in methods)]
    for method in methods:
        chosen = list(found[method].values())
        clusters = [record.document_id for record in chosen]
        likelihood = [found[method][key] for key in scored]
        rows[method] = Row(
            em=bootstrap_interval([record.em for record in chosen], clusters),
            f1=bootstrap_interval([record.f1 for record in chosen], clusters),
            failed=sum(bool(record.error) for record in chosen),
            answer_nll=bootstrap_interval(
                [record.answer_nll or 0.0 for record in likelihood], [record.document_id for record in likelihood]
            )
            if likelihood
            else None,
        )
    return SetReport(name, len(chosen), sum(record.gold_retrieved for record in chosen) / len(chosen), rows)


def _f1(records: Collection[Record]) -> tuple[list[float], list[str]]:
    """The F1 of each record, and its document as the cluster for the bootstrap."""
    return [record.f1 for record in records], [record.document_id for record in records]


def _compare(by_set: Mapping[str, Mapping[str, Mapping[str, Record]]], method: str, other: str) -> Comparison:
    differences = {
        name: [record.f1 - found[other][key].f1 for key, record in found[method].items()]
        for name, found in by_set.items()
    }
    clusters = {name: [record.document_id for record in found[method].values()] for name, found in by_set.items()}
    return Comparison(
        method,
        other,
        stratified_interval(list(differences.values()), list(clusters.values())),
        {name: bootstrap_interval(values, clusters[name]) for name, values in differences.items()},
    )
