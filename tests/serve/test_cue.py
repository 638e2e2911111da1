"""Mode cue as its users see it: a real engine, a real bank, and the prompts of training."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from transformers import AutoTokenizer

from bank_service.values.embedder import default_embedder
from regrad_vllm.client import Bank, Document
from regrad_vllm.encode.prompting import PromptBuilder
from regrad_vllm.learn.cues import Cues
from regrad_vllm.learner import Learner
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread, VllmServer
from tests.serve.test_server import BODIES, TWIN, events_of

TOWER = "The tower of Quist was built in 1412. Its bell is called Maren.\n\nThe stairs have 211 steps of oak wood."
ASKED = "What wood are the steps of the tower made of?"
PIER = "The pier of Orlen is 80 metres long. Its lamp burns whale oil."


@pytest.fixture
def sentences(bank: BankThread) -> Iterator[list[tuple[str, str, str]]]:
    """(id, title, text) of documents with several sentences, in namespace cues."""
    documents = [("tower", "The tower", TOWER), ("pier", "The pier", PIER)]
    with Bank(bank.address) as client:
        list(client.ingest([Document(id, text, title) for id, title, text in documents], namespace="cues"))
        yield documents
        for id, *_ in documents:
            client.delete(id, namespace="cues")


def trained_prompt(
    model: Path, learner: Learner, sentences: list[tuple[str, str, str]], used: dict[str, Any], number: int
) -> list[int]:
    """The tokens of the prompt that training makes for these documents. Checks the sentences that were used."""
    passages = {id: (title, text) for id, title, text in sentences}
    cue = Cues(default_embedder(), number).nearest(ASKED, [passages[document["id"]] for document in used["documents"]])
    assert len(cue) == number
    assert used["mode"] == "cue" and [item["text"] for item in used["cue"]] == [text for _, text in cue]
    for item in used["cue"]:
        assert passages[item["document"]][1][item["start"] : item["end"]] == item["text"]
    scores = [item["score"] for item in used["cue"]]
    assert scores == sorted(scores, reverse=True)
    builder = PromptBuilder(AutoTokenizer.from_pretrained(model), learner.config.prompts)
    return builder.question(ASKED, [learner.config.prompts.render_document(*passage) for passage in cue])


def test_a_prompt_in_mode_cue_is_token_by_token_the_one_of_training(
    server: VllmServer, model: Path, learner: Learner, sentences: list[tuple[str, str, str]]
) -> None:
    regrad = {"namespace": "cues", "mode": "cue", "top_k": 2}
    body = {"model": TWIN, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 1,
            "return_token_ids": True, "regrad": regrad}  # fmt: skip
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["prompt_token_ids"] == trained_prompt(model, learner, sentences, answer["regrad"], 2)
    blind = server.post("/v1/chat/completions", {**body, "regrad": {"namespace": "cues", "top_k": 2}}).json()
    assert blind["regrad"]["adapter"] == answer["regrad"]["adapter"] and blind["regrad"]["cue"] == []
    builder = PromptBuilder(AutoTokenizer.from_pretrained(model), learner.config.prompts)
    assert blind["prompt_token_ids"] == builder.question(ASKED)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_vllm_gets_the_messages_of_training_with_any_number_of_sentences(
    bank: BankThread,
    model: Path,
    learner: Learner,
    sentences: list[tuple[str, str, str]],
    tmp_path: Path,
    number: int,
) -> None:
    got: list[dict[str, Any]] = []

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        got.append(body)
        return JSONResponse({})

    async def run() -> list[dict[str, Any]]:
        used = []
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, _, _):
            regrad = {"namespace": "cues", "mode": "cue", "cue_sentences": number}
            for named in ({"top_k": 2}, {"document_ids": ["pier", "tower"]}):
                body = {
                    "model": "base",
                    "messages": [{"role": "user", "content": ASKED}],
                    "regrad": {**regrad, **named},
                }
                answer = await http.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                used.append(answer.json()["regrad"])
        return used

    tokenizer = AutoTokenizer.from_pretrained(model)
    for used, body in zip(asyncio.run(run()), got, strict=True):
        tokens = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        assert tokens == trained_prompt(model, learner, sentences, used, number)


@pytest.mark.parametrize("path", BODIES)
def test_every_route_has_mode_cue_also_for_documents_by_name_and_as_a_stream(
    server: VllmServer, sentences: list[tuple[str, str, str]], path: str
) -> None:
    regrad = {"namespace": "cues", "mode": "cue", "cue_sentences": 1, "document_ids": ["pier", "tower"]}
    body = {**BODIES[path], "model": TWIN, "regrad": regrad}
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    (sentence,) = answer.json()["regrad"]["cue"]
    assert sentence["document"] in ("pier", "tower") and sentence["text"] in TOWER + PIER
    with server.client.stream("POST", path, json={**body, "stream": True}) as stream:
        assert events_of(stream.iter_lines())[0]["regrad"]["cue"] == [sentence]
    blind = server.post(path, {**body, "regrad": {**regrad, "mode": "blind", "cue_sentences": None}}).json()
    name = "input_tokens" if path == "/v1/responses" else "prompt_tokens"
    assert answer.json()["usage"][name] > blind["usage"][name] + 5


def test_each_of_several_prompts_gets_a_cue_of_its_own(
    server: VllmServer, model: Path, sentences: list[tuple[str, str, str]]
) -> None:
    questions = ["What is the bell called?", "How long is the pier?"]
    body = {"model": TWIN, "prompt": questions, "max_tokens": 1, "return_token_ids": True,
            "regrad": {"namespace": "cues", "top_k": 2, "mode": "cue", "cue_sentences": 1}}  # fmt: skip
    answer = server.post("/v1/completions", body).json()
    cues = [[item["text"] for item in prompt["cue"]] for prompt in answer["regrad"]["prompts"]]
    assert cues == [["Its bell is called Maren."], ["The pier of Orlen is 80 metres long."]]
    tokenizer = AutoTokenizer.from_pretrained(model)
    for choice, (cue,), question in zip(answer["choices"], cues, questions, strict=True):
        assert str(tokenizer.decode(choice["prompt_token_ids"])).endswith(f"{cue}\n\n{question}")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("least", "mode"), [(0.0, "cue"), (1.0, "icl")])
def test_mode_auto_gives_the_answer_of_the_mode_that_it_ends_in(
    server: VllmServer, sentences: list[tuple[str, str, str]], path: str, least: float, mode: str
) -> None:
    regrad = {"namespace": "cues", "top_k": 2}
    body = {**BODIES[path], "model": TWIN, "temperature": 0, "max_tokens": 8, "return_token_ids": True}
    plain = server.post(path, {**body, "regrad": {**regrad, "mode": mode}}).json()
    asked = {**body, "regrad": {**regrad, "mode": "auto", "min_confidence": least}}
    answer = server.post(path, asked).json()
    assert answer["regrad"]["mode"] == mode and 0 < answer["regrad"]["confidence"] < 1
    assert answer["usage"] == plain["usage"]
    (choice,), (expected,) = answer["choices"], plain["choices"]
    assert {**choice, "prompt_token_ids": None} == {**expected, "prompt_token_ids": None}
    with server.client.stream("POST", path, json={**asked, "stream": True}) as stream:
        events = events_of(stream.iter_lines())
    assert events[0]["regrad"]["mode"] == mode
    told = [choice for event in events for choice in event["choices"]]
    assert all(choice.get("logprobs") is None for choice in told)
    ids = [token for choice in told for token in choice.get("token_ids") or ()]
    assert ids == expected["token_ids"]
