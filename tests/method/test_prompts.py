"""The templates of a learner's prompts."""

from __future__ import annotations

import pytest

from regrad_vllm.prompts import Prompts


def test_prompts_fill_each_place_once_and_leave_braces_in_texts_alone() -> None:
    prompts = Prompts()
    assert prompts.render_document("A {text}", "B {title}") == "A {text}\nB {title}"
    assert prompts.render_document("", "B") == "B"
    assert (
        prompts.render_icl("Why {documents}?", ["one {question}", "two"]) == "one {question}\n\ntwo\n\nWhy {documents}?"
    )
    with pytest.raises(ValueError, match="prompts.blind must contain {question}, got 'no place'"):
        Prompts(blind="no place")
