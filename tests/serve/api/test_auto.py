"""Mode auto: the answer with sentences in the prompt, and the one with documents where the model isn't sure."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from regrad_vllm.client import Bank, Document
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api import kept_answer
from regrad_vllm.serve.settings import Settings
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread

TEXT = "The tower of Quist was built in 1412. Its bell is called Maren. The stairs have 211 steps of oak wood."
QUESTION = "What is the bell of the tower of Quist called?"
CHAT = {"model": "base", "messages": [{"role": "user", "content": QUESTION}]}
SURE, UNSURE = [-0.1, -0.3], [-0.1, -3.0]  # log-probabilities of an answer's tokens


@pytest.fixture
def tower(bank: BankThread) -> Any:
    with Bank(bank.address) as client:
        list(client.ingest([Document("tower", TEXT, "The tower")], namespace="auto"))
        yield
        client.delete("tower", namespace="auto")


def chat(text: str, logarithms: list[float], body: dict[str, Any]) -> Response:
    """vLLM's answer: an object, or a stream with an event for each token."""
    tokens = [{"token": "x", "logprob": value} for value in logarithms] if body.get("logprobs") else []
    if not body.get("stream"):
        logprobs = {"content": tokens} if tokens else None
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        return JSONResponse({"id": "a", "choices": [choice]})

    async def events() -> Any:
        for token in tokens or [None]:
            logprobs = None if token is None else {"content": [token]}
            choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def completion(text: str, logarithms: list[float], body: dict[str, Any]) -> Response:
    def answer(values: list[float]) -> dict[str, Any]:
        logprobs = None if body.get("logprobs") is None else {"token_logprobs": values}
        return {"id": "a", "choices": [{"index": 0, "text": text, "logprobs": logprobs}]}

    if not body.get("stream"):
        return JSONResponse(answer(logarithms))
    events = [f"data: {json.dumps(answer([value]))}\n\n" for value in logarithms]
    return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")


def asked(
    bank: BankThread, learner: Learner, folder: Path, path: str, body: dict[str, Any], first: list[float],
    failures: Mapping[int, Response] | None = None, **settings: Any,
) -> tuple[httpx.Response, list[dict[str, Any]]]:  # fmt: skip
    """The answer, and the bodies that vLLM got. Its answers have the log-probabilities ``first``, but for
    ``failures`` by their number."""
    got: list[dict[str, Any]] = []

    async def handler(given: dict[str, Any], _: str) -> Any:
        got.append(given)
        if failures and len(got) in failures:
            return failures[len(got)]
        return (chat if "messages" in given else completion)(f"answer {len(got)}", first, given)

    async def run() -> httpx.Response:
        async with serving(bank, learner, folder, EngineLists(), handler, **settings) as (http, _, arena, _):
            answer = await http.post(path, json=body)
            while arena.figures().num_holds:  # after an error it waits for the engine
                await asyncio.sleep(0.02)
            return answer

    return asyncio.run(asyncio.wait_for(run(), 200)), got


def no() -> Response:
    return JSONResponse({"error": {"message": "no"}}, status_code=400)


def regrad(**more: Any) -> dict[str, Any]:
    return {"namespace": "auto", "mode": "auto", "cue_sentences": 1, "top_k": 1, **more}


@pytest.mark.usefixtures("tower")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("first", "mode"), [(SURE, "cue"), (UNSURE, "icl")])
def test_an_unsure_answer_is_asked_again_with_the_document_and_the_client_gets_one_answer(
    bank: BankThread, learner: Learner, tmp_path: Path, path: str, stream: bool, first: list[float], mode: str
) -> None:
    body = {**(CHAT if "chat" in path else {"model": "base", "prompt": QUESTION}), "stream": stream}
    answer, got = asked(bank, learner, tmp_path, path, {**body, "regrad": regrad()}, first)
    assert answer.status_code == 200 and len(got) == (1 if mode == "cue" else 2)
    prompts = [given["prompt"] if "prompt" in given else given["messages"][-1]["content"] for given in got]
    assert "Its bell is called Maren." in prompts[0] and TEXT not in prompts[0]
    assert all(TEXT in prompt for prompt in prompts[1:])
    told = answer.text
    assert f"answer {len(got)}" in told and (len(got) == 1 or "answer 1" not in told)
    assert "logprob" not in told.replace('"logprobs":null', "").replace('"logprobs": null', "")
    start = told.index('"regrad":') + len('"regrad":')
    used = json.JSONDecoder().raw_decode(told[start:])[0]
    assert used["mode"] == mode and bool(used["cue"]) == (mode == "cue")
    assert used["confidence"] == pytest.approx(math.exp(sum(first) / 2), abs=1e-6)
    if stream:
        assert told.endswith("data: [DONE]\n\n")
    else:
        assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.usefixtures("tower")
def test_the_request_and_the_server_say_how_sure_is_sure_enough(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    path = "/v1/chat/completions"
    for given, settings, times in (
        ({"min_confidence": 0.0}, {}, 1),
        ({"min_confidence": 1.0}, {}, 2),
        ({"mode": None}, {"mode": "auto", "min_confidence": 0.1}, 1),
        ({"mode": None}, {"mode": "auto", "min_confidence": 0.9}, 2),
    ):
        body = {**CHAT, "regrad": regrad(**given)}
        assert len(asked(bank, learner, tmp_path, path, body, UNSURE, **settings)[1]) == times


@pytest.mark.usefixtures("tower")
def test_a_client_that_wants_log_probabilities_gets_them_and_an_error_is_not_asked_for_again(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    path = "/v1/chat/completions"
    body = {**CHAT, "logprobs": True, "regrad": regrad()}
    answer, _ = asked(bank, learner, tmp_path, path, body, SURE)
    assert [token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]] == SURE
    answer, got = asked(bank, learner, tmp_path, path, body, SURE, {1: no()})
    assert (answer.status_code, len(got), answer.json()) == (400, 1, {"error": {"message": "no"}})
    for wanted in (0, 2):
        body = {"model": "base", "prompt": QUESTION, "logprobs": wanted, "regrad": regrad()}
        answer, got = asked(bank, learner, tmp_path, "/v1/completions", body, SURE)
        assert answer.json()["choices"][0]["logprobs"] == {"token_logprobs": SURE} and got[0]["logprobs"] == wanted


@pytest.mark.usefixtures("tower")
@pytest.mark.parametrize("stream", [False, True])
def test_the_first_answer_is_given_where_the_second_is_refused(
    bank: BankThread, learner: Learner, tmp_path: Path, stream: bool
) -> None:
    body = {**CHAT, "stream": stream, "regrad": regrad()}
    answer, got = asked(bank, learner, tmp_path, "/v1/chat/completions", body, UNSURE, {2: no()})
    assert (answer.status_code, len(got)) == (200, 2) and "answer 1" in answer.text
    assert "a second answer, with the documents in the prompt, failed" in answer.text


@pytest.mark.usefixtures("tower")
def test_an_error_within_the_first_stream_is_passed_on_and_not_asked_again(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    token = {"choices": [{"index": 0, "delta": {}, "logprobs": {"content": [{"token": "x", "logprob": -9.0}]}}]}
    events = [f"data: {json.dumps(event)}\n\n" for event in (token, {"error": {"message": "dead"}})]
    broken = StreamingResponse(iter(events), media_type="text/event-stream")
    body = {**CHAT, "stream": True, "regrad": regrad()}
    answer, got = asked(bank, learner, tmp_path, "/v1/chat/completions", body, UNSURE, {1: broken})
    assert len(got) == 1 and '{"error": {"message": "dead"}}' in answer.text


@pytest.mark.usefixtures("tower")
def test_an_answer_without_log_probabilities_counts_as_sure(bank: BankThread, learner: Learner, tmp_path: Path) -> None:
    bare = JSONResponse({"choices": [{"index": 0, "message": {"content": "bare"}, "logprobs": None}]})
    body = {**CHAT, "regrad": regrad()}
    answer, got = asked(bank, learner, tmp_path, "/v1/chat/completions", body, UNSURE, {1: bare})
    assert len(got) == 1 and (answer.json()["regrad"]["mode"], answer.json()["regrad"]["confidence"]) == ("cue", None)


@pytest.mark.usefixtures("tower")
def test_a_stream_that_is_too_long_to_keep_passes(
    bank: BankThread, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_answer, "MAX_KEPT_BYTES", 30)
    body = {**CHAT, "stream": True, "regrad": regrad()}
    answer, got = asked(bank, learner, tmp_path, "/v1/chat/completions", body, UNSURE)
    assert len(got) == 1 and answer.text.count("answer 1") == 2 and answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.usefixtures("tower")
@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"n": 2}, "n other than 1"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"include_reasoning": False}, "include_reasoning false"),
    ],
)
def test_what_is_not_asked_twice_has_mode_cue_or_is_refused(
    bank: BankThread, learner: Learner, tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    path = "/v1/chat/completions"
    answer, got = asked(bank, learner, tmp_path, path, {**CHAT, **more, "regrad": regrad()}, UNSURE)
    assert (answer.status_code, answer.json()["error"]["param"], got) == (400, "regrad.mode", [])
    body = {**CHAT, **more, "regrad": regrad(mode=None)}
    answer, got = asked(bank, learner, tmp_path, path, body, UNSURE, mode="auto")
    used = answer.json()["regrad"]
    assert (used["mode"], used["confidence"], len(got)) == ("cue", None, 1)
    assert used["reason"] == f"the mode is cue and not the server's auto: with {why} nothing is asked twice"


@pytest.mark.usefixtures("tower")
def test_several_prompts_are_not_asked_twice(bank: BankThread, learner: Learner, tmp_path: Path) -> None:
    body = {"model": "base", "prompt": [QUESTION, QUESTION]}
    asked_for = {**body, "regrad": regrad()}
    answer, got = asked(bank, learner, tmp_path, "/v1/completions", asked_for, UNSURE)
    assert (answer.status_code, answer.json()["error"]["param"], got) == (400, "regrad.mode", [])
    asked_for = {**body, "regrad": regrad(mode=None)}
    answer, got = asked(bank, learner, tmp_path, "/v1/completions", asked_for, UNSURE, mode="auto")
    assert [used["mode"] for used in answer.json()["regrad"]["prompts"]] == ["cue", "cue"] and len(got) == 1


def test_two_sentences_are_the_default() -> None:
    settings = Settings(learner=Path("/l"))
    assert (settings.mode, settings.cue_sentences) == ("cue", 2)
