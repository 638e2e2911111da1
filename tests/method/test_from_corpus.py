from __future__ import annotations

import pytest

from regrad_vllm.data.from_corpus import is_usable, parse
from regrad_vllm.data.questions import SourceDocument

BRIDGE = SourceDocument("d", "Orlen", "The bridge of Orlen was built in 1652 by the brothers Kreel.", "corpus")


def test_a_models_text_is_searched_for_objects_with_question_and_answer() -> None:
    said = """Sure! Here they are:
1. {"question": "When was  it built?", "answer": "1652"}
{"question": "no answer"} {"question": 3, "answer": "x"} {broken
[{"question": "Who?", "answer": "Kreel"}]"""
    assert list(parse(said)) == [("When was it built?", "1652"), ("Who?", "Kreel")]
    assert list(parse("")) == []


@pytest.mark.parametrize(
    ("question", "answer", "usable"),
    [
        ("When was the bridge of Orlen built?", "1652", True),
        ("Who built the bridge of Orlen?", "The brothers Kreel.", True),
        ("When was the bridge of Orlen built?", "1653", False),  # stands nowhere
        ("Who were the brothers Kreel of Orlen?", "the brothers Kreel", False),  # gives it away
        ("What does this text say of the bridge?", "1652", False),
        ("Name the year of the bridge", "1652", False),  # no question
        ("When?", "1652", False),  # about what?
        ("What is the story of the Orlen bridge?", BRIDGE.text, False),  # an answer that goes on
        ("When was the bridge of Orlen built?", "", False),
    ],
)
def test_only_what_can_be_asked_alone_and_checked_is_kept(question: str, answer: str, usable: bool) -> None:
    assert is_usable(question, answer, BRIDGE) is usable
