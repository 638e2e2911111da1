"""The summary of an evaluation, from invented answers."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from regrad_vllm.evaluate.answers import Record
from regrad_vllm.evaluate.scoring import score
from regrad_vllm.evaluate.summary import summarise
from regrad_vllm.evaluate.summary_page import markdown, render
from regrad_vllm.reporting.intervals import stratified_interval


def records(methods: tuple[str, ...] = ("base", "rag_learner", "regrad", "regrad_wrong")) -> list[Record]:
    """ReGrad is right in two of three, RAG + φ* in one of three, the others never; nq has twice the questions."""
    made = []
    for name, number in (("squad", 60), ("nq", 120)):
        for index in range(number):
            for method in methods:
                right = {"regrad": index % 3 < 2, "rag_learner": index % 3 < 1}.get(method, False)
                said = "Ada" if right else "Bob"
                made.append(
                    Record(
                        f"{name}{index}",
                        f"document of {name}{index}",
                        name,
                        method,
                        f"q{index}",
                        ("Ada",),
                        said,
                        float(right),
                        float(right),
                        index % 2 == 0,
                        "",
                    )
                )
    return made


def test_the_mean_over_the_sets_counts_each_set_once_and_differences_are_paired() -> None:
    found = records()
    random.Random(0).shuffle(found)
    report = summarise(found)
    assert report.overall["regrad"].mean == pytest.approx(2 / 3) and report.overall["base"].high == 0
    by_pair = {(entry.method, entry.other): entry for entry in report.comparisons}
    paired = by_pair["regrad", "rag_learner"].difference
    assert paired.mean == pytest.approx(1 / 3)
    own = report.overall["regrad"]
    assert paired.high - paired.low < 1.3 * (own.high - own.low), "pairing keeps the interval narrow"
    assert {entry.name: entry.recall for entry in report.sets} == {"squad": 0.5, "nq": 0.5}
    assert report.figures()["questions"] == 180
    assert report.figures()["regrad"] == {"mean_f1": 0.6667, "low": pytest.approx(own.low, abs=1e-4),
                                          "high": pytest.approx(own.high, abs=1e-4)}  # fmt: skip


def test_a_method_that_was_not_asked_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="set 'nq'"):
        summarise(records()[:-1])


def test_the_interval_of_several_sets_is_narrower_than_of_one() -> None:
    one = stratified_interval([[0.0, 1.0] * 30])
    four = stratified_interval([[0.0, 1.0] * 30] * 4)
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.2)


def test_questions_about_one_document_count_together() -> None:
    values = [float(index // 5 % 2) for index in range(100)]  # five questions a document, all right or all wrong
    apart = stratified_interval([values])
    together = stratified_interval([values], [[str(index // 5) for index in range(100)]])
    assert together.mean == apart.mean == 0.5
    assert together.high - together.low == pytest.approx(5**0.5 * (apart.high - apart.low), rel=0.2)


def test_likelihoods_are_compared_on_the_questions_that_every_method_has() -> None:
    found = [
        replace(record, answer_nll=None if (record.question, record.method) == ("q0", "base") else 1.0 + index % 2)
        for index, record in enumerate(records(("base", "regrad")))
    ]
    found = [replace(r, answer_nll=90.0) if (r.question, r.method) == ("q0", "regrad") else r for r in found]
    rows = summarise(found).sets[0].rows
    assert rows["base"].answer_nll is not None and rows["regrad"].answer_nll is not None
    assert rows["base"].answer_nll.mean == 1.0 and rows["regrad"].answer_nll.mean == 2.0
    assert "2.000 [2.000, 2.000]" in markdown(summarise(found))


def test_yes_and_no_are_scored_by_the_answers_first_word() -> None:
    assert score("Yes, they do.", ("yes",), "yesno") == 1.0
    assert score("no", ("yes",), "yesno") == 0.0
    assert score("", ("yes",), "yesno") == 0.0
    assert score("I say yes", ("yes",), "yesno") == 0.0
    assert score("I say yes", ("yes",), "span") == pytest.approx(0.5)
    assert score("A", ("A",), "choice") == 1.0, "an article may be a choice"
    assert score("New York City", ("New York",), "choice") == 0.0


def test_the_page_shows_every_figure_and_needs_nothing_from_elsewhere() -> None:
    report = summarise(records())
    page = render(report, {"command": "regrad eval --sets <a>", "documents": 7})
    assert page.count("<svg") == 3
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", re.sub(r"xmlns:xlink=\S+|xlink:href=\"#", "", page))
    assert "regrad eval --sets &lt;a&gt;" in page
    for line in markdown(report).splitlines():
        for figure in re.findall(r"-?\d+\.\d \[[^]]+\]", line):
            if "EM" not in line and "| squad (" not in line and "| nq (" not in line:
                assert figure in page
    assert json.dumps(report.plain())
