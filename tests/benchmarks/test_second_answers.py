"""Mode auto's thresholds: which answers count, and which threshold is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.second_answers import ALWAYS, figures, lowest_as_good


def answer(confidence: float | None, first: float, icl: float, name: str = "squad") -> dict[str, Any]:
    tokens = {"first_tokens": 100, "icl_tokens": 200}
    return {"set": name, "document": "d", "confidence": confidence, "first_f1": first, "icl_f1": icl, **tokens}


ANSWERS = [answer(0.9, 1.0, 0.0), answer(0.55, 0.0, 1.0), answer(0.55, 0.0, 1.0), answer(0.1, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("threshold", "f1", "asked_again", "tokens"), [(0.0, 0.25, 0, 100), (0.6, 0.75, 0.75, 250), (ALWAYS, 0.5, 1, 300)]
)
def test_answers_below_the_threshold_are_the_second_ones(
    threshold: float, f1: float, asked_again: float, tokens: float
) -> None:
    found = figures(ANSWERS, threshold)
    assert (found["f1"], found["asked_again"], found["prompt_tokens"]) == (f1, asked_again, tokens)
    assert found["over_icl"] == tokens / 200 and found["low"] <= f1 <= found["high"]


def test_an_answer_of_unknown_confidence_is_kept() -> None:
    assert figures([answer(None, 1.0, 0.0)], ALWAYS)["f1"] == 1.0


def test_the_lowest_threshold_as_good_as_documents_is_chosen() -> None:
    assert lowest_as_good(ANSWERS) == 0.6
    assert lowest_as_good([answer(0.9, 1.0, 0.0)]) == 0.0
