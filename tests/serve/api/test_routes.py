"""Reading the question out of each endpoint's body, and putting the learner's prompts into it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from regrad_vllm.serve.api.routes import SHAPES, join_prompts, split_prompts

CHAT, TEXT, RESPONSES = (SHAPES[f"/v1/{name}"] for name in ("chat/completions", "completions", "responses"))
BATCH = SHAPES["/v1/chat/completions/batch"]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("shape", "body", "question"),
    [
        (CHAT, {"messages": [user("old"), {"role": "assistant", "content": "a"}, user("new")]}, "new"),
        (CHAT, {"messages": [user("q"), {"role": "assistant", "content": "a"}]}, "q"),
        (CHAT, {"messages": [user([{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}])]}, "a\nb"),
        (CHAT, {"messages": [user([IMAGE])]}, None),
        (CHAT, {"messages": [user(" ")]}, None),
        (CHAT, {"messages": "text"}, None),
        (CHAT, {"messages": [3, {"role": "user"}]}, None),
        (CHAT, {}, None),
        (TEXT, {"prompt": "p"}, "p"),
        (TEXT, {"prompt": ["p"]}, "p"),
        (TEXT, {"prompt": ["p", "q"]}, None),
        (TEXT, {"prompt": [1, 2, 3]}, None),
        (TEXT, {"prompt": [[1, 2]]}, None),
        (RESPONSES, {"input": "i"}, "i"),
        (RESPONSES, {"input": [user([{"type": "input_text", "text": "i"}])]}, "i"),
        (RESPONSES, {"input": ""}, None),
    ],
)
def test_the_question_is_the_last_thing_the_user_said(shape: Any, body: dict[str, Any], question: str | None) -> None:
    assert shape.question(body) == question


@pytest.mark.parametrize(
    ("shape", "body", "edited"),
    [
        (CHAT, {"messages": [user("a"), user("b")], "n": 1}, {"messages": [user("a"), user("<b>")], "n": 1}),
        (CHAT, {"messages": [user([IMAGE, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]},
         {"messages": [user([IMAGE, {"type": "text", "text": "<a\nb>"}])]}),
        (CHAT, {"messages": []}, None),
        (TEXT, {"prompt": ["p"]}, {"prompt": "<p>"}),
        (TEXT, {"prompt": [1]}, None),
        (RESPONSES, {"input": "i"}, {"input": "<i>"}),
        (RESPONSES, {"input": [user("i")]}, {"input": [user("<i>")]}),
    ],
)  # fmt: skip
def test_editing_makes_a_new_body(shape: Any, body: dict[str, Any], edited: dict[str, Any] | None) -> None:
    before = copy.deepcopy(body)
    assert shape.with_question(body, lambda text: f"<{text}>") == edited
    assert body == before


@pytest.mark.parametrize(
    "body", [{"prompt": "p"}, {"prompt": ["p"]}, {"prompt": [1, 2]}, {"prompt": [[1], [2]]}, {"prompt": ["p", [1]]}, {}]
)
def test_a_body_without_several_texts_stays_whole(body: dict[str, Any]) -> None:
    assert split_prompts(body, TEXT) == [body]
    assert split_prompts({"prompt": ["p", "q"]}, CHAT) == [{"prompt": ["p", "q"]}]


def test_several_texts_are_split_and_joined_again() -> None:
    body = {"prompt": ["p", "q"], "n": 2}
    parts = split_prompts(body, TEXT)
    assert parts == [{"prompt": "p", "n": 2}, {"prompt": "q", "n": 2}]
    assert join_prompts(body, parts, TEXT) == body


def test_conversations_are_split_and_joined_again_whatever_else_is_in_the_body() -> None:
    body = {"messages": [[{"role": "user", "content": "p"}], [{"role": "user", "content": "q"}]], "prompt": "x"}
    parts = split_prompts(body, BATCH)
    assert [part["messages"][0][0]["content"] for part in parts] == ["p", "q"]
    assert join_prompts(body, parts, BATCH) == body


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("shape", "body", "expected"),
    [
        (CHAT, {"messages": [user("a")]}, {"messages": [SYSTEM, user("a")]}),
        (CHAT, {"messages": [{"role": "developer", "content": "d"}, user("a")]}, None),
        (CHAT, {"messages": [user("a"), {"role": "system", "content": "late"}]}, None),
        (TEXT, {"prompt": "p"}, None),
        (RESPONSES, {"input": "i"}, {"input": "i", "instructions": "s"}),
        (RESPONSES, {"input": "i", "instructions": "mine"}, None),
        (RESPONSES, {"input": [{"role": "system", "content": "mine"}, user("i")]}, None),
        (RESPONSES, {"input": "i", "previous_response_id": "r"}, None),
    ],
)
def test_the_system_prompt_comes_where_there_is_none(
    shape: Any, body: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert shape.with_system(body, "s") == (body if expected is None else expected)
