"""Tagging answers as they pass, and remembering the last ones."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from regrad_vllm.serve.api.answer import AnswerTagger
from regrad_vllm.serve.api.used import Used, UsedByPrompts, UsedDocument, UsedMemory

USED = Used("r1", "default", "blind", 1.0, (UsedDocument("ä b,c", 2, 0.5, 1.0, "0" * 64),), adapter="regrad-x")


def tag(kind: str, bodies: list[bytes], status: int = 200) -> tuple[dict[str, str], list[bytes], AnswerTagger]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> AnswerTagger:
        tagger = AnswerTagger(send, USED)
        headers = [(b"Content-Type", kind.encode()), (b"content-length", str(sum(map(len, bodies))).encode())]
        await tagger({"type": "http.response.start", "status": status, "headers": headers})
        for index, body in enumerate(bodies):
            await tagger({"type": "http.response.body", "body": body, "more_body": index < len(bodies) - 1})
        return tagger

    tagger = asyncio.run(run())
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    assert [message["type"] for message in sent[1:]] == ["http.response.body"] * len(sent[1:])
    assert not sent[-1].get("more_body", False)
    return headers, [message["body"] for message in sent[1:]], tagger


@pytest.mark.parametrize("bodies", [[b'{"a": 1}'], [b'{"a"', b": 1}"], [b"", b' {"a": 1}', b""]])
def test_a_json_answer_gets_the_object_the_headers_and_its_new_length(bodies: list[bytes]) -> None:
    headers, parts, tagger = tag("application/json", bodies)
    assert json.loads(b"".join(parts)) == {"regrad": USED.as_json(), "a": 1}
    assert int(headers["content-length"]) == len(b"".join(parts))
    assert headers["x-regrad-adapter"] == "regrad-x"
    assert headers["x-regrad-documents"] == "%C3%A4%20b%2Cc"
    assert tagger.succeeded


def test_an_empty_object_stays_json() -> None:
    assert json.loads(b"".join(tag("application/json", [b"{}"])[1])) == {"regrad": USED.as_json()}


def test_an_error_passes_as_it_is() -> None:
    headers, parts, tagger = tag("application/json", [b'{"error": {}}'], status=400)
    assert parts == [b'{"error": {}}'] and "x-regrad-adapter" not in headers
    assert not tagger.succeeded


def test_what_is_not_an_object_passes_as_it_is() -> None:
    assert tag("application/json", [b"null"])[1] == [b"null"]
    assert tag("text/plain", [b"{}"])[1] == [b"{}"]


@pytest.mark.parametrize(
    "bodies",
    [
        [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"],
        [b": keep-alive\n\n", b'event: x\ndata: {"n": 1}\n\ndata: {"n": 2}\n\n', b"data: [DONE]\n\n"],
        [b"da", b'ta: {"n": 1}\n', b"\n", b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"],
    ],
)
def test_a_streams_first_event_gets_the_object_however_it_is_cut(bodies: list[bytes]) -> None:
    _, parts, _ = tag("text/event-stream; charset=utf-8", bodies)
    lines = [line for line in b"".join(parts).decode().splitlines() if line.startswith("data: ")]
    assert [json.loads(line[6:]) for line in lines[:2]] == [{"regrad": USED.as_json(), "n": 1}, {"n": 2}]
    assert lines[2] == "data: [DONE]"


def test_keep_alive_comments_are_not_held_back() -> None:
    assert tag("text/event-stream", [b": keep-alive\n\n", b"data: {}\n\n"])[1][0] == b": keep-alive\n\n"


def test_a_stream_without_any_event_passes() -> None:
    assert b"".join(tag("text/event-stream", [b": a\n\n", b"data: [DONE]\n\n"])[1]) == b": a\n\ndata: [DONE]\n\n"


def test_ids_beyond_the_headers_room_are_counted() -> None:
    many = Used(
        "r",
        "n",
        "blind",
        1.0,
        tuple(UsedDocument("x" * 254 + f"{n:02d}", 1, 1.0, 1.0, "0" * 64) for n in range(64)),
        adapter="regrad-x",
    )
    value = dict(many.headers())[b"x-regrad-documents"]
    assert len(value) < 820 and value.endswith(b", +61")
    documents = tuple(UsedDocument("€" * 85 + end, 1, 1.0, 1.0, "0" * 64) for end in "xy")
    longest = Used("r", "n", "blind", 1.0, documents, adapter="regrad-x")
    assert dict(longest.headers())[b"x-regrad-documents"] == b"%E2%82%AC" * 85 + b"x, +1"


def test_several_prompts_are_told_apart_by_their_choices() -> None:
    plain = Used("r1", "default", "blind", 1.0, reason="none")
    used = UsedByPrompts("r1", (USED, plain, USED), 2)
    told = used.as_json()
    assert told["request_id"] == "r1"
    assert [prompt["choices"] for prompt in told["prompts"]] == [[0, 1], [2, 3], [4, 5]]
    assert [len(prompt["documents"]) for prompt in told["prompts"]] == [1, 0, 1]
    assert told["prompts"][1]["reason"] == "none" and json.loads(used.json_bytes()) == told
    headers = dict(used.headers())
    assert headers[b"x-regrad-adapter"] == b"regrad-x, none"
    assert headers[b"x-regrad-documents"] == b"%C3%A4%20b%2Cc"
    many = UsedByPrompts("r", [Used("r", "n", "blind", 1.0, adapter=f"regrad-{n:040x}") for n in range(64)], 1)
    assert dict(many.headers())[b"x-regrad-adapter"].endswith(b", +60")


def test_an_answer_that_is_remembered_keeps_no_long_query() -> None:
    used = Used("r", "n", "blind", 1.0, query="a" * 40_000 + "z" * 25_000)
    assert used.query is not None and len(used.query) == 503
    assert used.as_json()["query"] == used.query == "a" * 250 + " … " + "z" * 250


def test_the_memory_forgets_the_oldest() -> None:
    memory = UsedMemory(2)
    for name in ("a", "b", "a", "c"):
        memory.add(Used(name, "n", "blind", 1.0))
    assert len(memory) == 2 and memory.get("b") is None
    assert memory.get("chatcmpl-a") is memory.get("cmpl-a") is memory.get("a") is not None
