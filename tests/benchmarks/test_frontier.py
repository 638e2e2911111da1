"""The frontier: which requests it makes, and the figures of its answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frontier import METHODS, TOP_KS, compare, draw, figures, is_over, planned, table
from regrad_vllm.data.questions import Question

TOKENS = {"base": 30, "rag": 200, "blind": 30, "cue": 100}


def answers() -> list[dict[str, Any]]:
    """Two sets of two questions. Every method has F1 1 in the first set. In the second one, auto asks again."""
    found = []
    for number in range(4):
        name = "squad" if number < 2 else "nq"
        for method in METHODS:
            for k in TOP_KS if method != "base" else (1,):
                again = method == "auto" and name == "nq"
                found.append(
                    {"id": str(number), "set": name, "document": str(number), "method": method, "k": k,
                     "f1": 1.0 if name == "squad" or again else 0.0, "ms": 100.0 * k + number, "asked_again": again,
                     "prompt_tokens": 200 * k if again else TOKENS.get(method, 100)}
                )  # fmt: skip
    return found


def test_each_question_is_asked_under_every_method_and_k_once_in_an_order_of_its_own() -> None:
    questions = [Question(str(number), "who?", ("Ada",), ("d",), "squad") for number in range(3)]
    jobs = planned(questions, seed=0)
    assert jobs == planned(questions, seed=0) and max(Counter((q.id, *point) for q, *point in jobs).values()) == 1
    orders = [[point for asked, *point in jobs if asked == question] for question in questions]
    assert orders[0] != orders[1] and sorted(map(tuple, orders[0])) == sorted(map(tuple, orders[1]))
    counts = Counter(method for method, _ in orders[0])
    assert counts == {method: 1 if method == "base" else 3 for method in METHODS}, "base has no documents, so no k"


def test_the_sets_are_asked_in_turn() -> None:
    sets = ("squad", "squad", "squad", "nq")
    questions = [Question(str(number), "who?", ("Ada",), ("d",), name) for number, name in enumerate(sets)]
    assert list(dict.fromkeys(question.id for question, *_ in planned(questions, seed=0))) == ["0", "3", "1", "2"]


def test_a_run_ends_between_questions_once_two_are_answered() -> None:
    new, old = (Question(id, "who?", ("Ada",), ("d",), "squad") for id in ("new", "3"))
    assert is_over(answers(), new, minutes=1, seconds=61.0)
    assert not is_over(answers(), old, minutes=1, seconds=61.0), "its other answers come first"
    assert not is_over(answers(), new, minutes=1, seconds=59.0) and not is_over(answers(), new, None, 1e9)
    assert not is_over([answer for answer in answers() if answer["id"] == "3"], new, minutes=1, seconds=61.0)


def test_a_point_has_the_mean_over_sets_the_median_time_and_the_tokens_of_all_prompts() -> None:
    found = figures(answers())
    assert found["cue"][3]["f1"] == 0.5 and found["cue"][3]["by_set"] == {"squad": 1.0, "nq": 0.0}
    assert (found["cue"][3]["ms"], found["cue"][3]["ms_quartiles"]) == (301.5, [300.8, 302.2])
    assert list(found["base"]) == [1] and found["rag"][10]["prompt_tokens"] == 200
    auto = found["auto"][3]
    assert auto["prompt_tokens"] == pytest.approx((2 * 100 + 2 * (100 + 600)) / 4), "those of both prompts"
    assert auto["asked_again"] == 0.5 and auto["low"] == auto["high"] == 1.0


def test_two_methods_are_compared_question_by_question_without_pubmedqa() -> None:
    made = answers()
    for answer in made:
        if answer["method"] == "auto":
            answer["ms"] /= 2
    both = compare(made, "auto", "rag")[3]
    assert both["f1"] == both["low"] == 0.5 and both["ms"] == both["ms_total"] == 0.5
    assert both["prompt_tokens"] == 2.0
    yes_no = [{**answer, "set": "pubmedqa"} if answer["set"] == "nq" else answer for answer in made]
    assert compare(yes_no, "auto", "rag")[3]["f1"] == 0.0


def test_the_table_has_a_row_a_point_and_the_picture_all_methods(tmp_path: Path) -> None:
    found = figures(answers())
    rows = table(found).splitlines()[2:]
    assert len(rows) == 3 * (len(METHODS) - 1) + 1
    assert "| ReGrad, auto | 10 | 100.0 [100.0, 100.0] | 1100 | 1002 [1001, 1002] |" in rows
    draw(found, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").stat().st_size > 10_000
