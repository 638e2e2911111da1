"""The endpoint as its users see it: a real engine, a real bank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from regrad_vllm.learner import Learner
from regrad_vllm.naming import adapter_name
from tests.serve.support import BASE, MAX_NUM_SEQS, BankThread, VllmServer
from tests.serve.test_server_errors import eventually

TWIN = BASE + "-regrad"
QUESTION = "What is the answer to riddle 7?"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6, "ignore_eos": True},
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 6, "ignore_eos": True},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 6},
}


def text_of(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def events_of(lines: Iterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def test_models_list_has_the_base_model_untouched_and_its_twin(server: VllmServer) -> None:
    cards = {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}
    assert set(cards) == {BASE, TWIN}
    assert cards[BASE]["parent"] is None
    assert cards[TWIN]["parent"] == BASE


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_says_what_it_was_made_with(
    server: VllmServer, bank: BankThread, learner: Learner, path: str
) -> None:
    body = {**BODIES[path], "model": BASE, "temperature": 0}
    plain = server.post(path, body)
    answer = server.post(path, {**body, "regrad": {"document_ids": ["doc-7", "doc-9"], "gamma": 4.0}})
    assert plain.status_code == answer.status_code == 200, answer.text
    assert "regrad" not in plain.json() and "x-regrad-adapter" not in plain.headers
    used = answer.json()["regrad"]
    digests = [document["gradient_digest"] for document in used["documents"]]
    assert [document["id"] for document in used["documents"]] == ["doc-7", "doc-9"]
    assert used["adapter"] == adapter_name(learner.fingerprint, digests, [1.0, 1.0], 4.0)
    assert (used["gamma"], used["mode"], used["fallback"], used["reason"]) == (4.0, "blind", False, None)
    assert {"retrieve", "fetch", "resident"} == set(used["timings_ms"])
    assert answer.headers["x-regrad-adapter"] == used["adapter"]
    assert answer.headers["x-regrad-documents"] == "doc-7, doc-9"
    assert answer.json()["model"] == BASE
    assert text_of(answer.json()) != text_of(plain.json())


@pytest.mark.parametrize("path", BODIES)
def test_the_twins_name_turns_regrad_on_with_the_defaults(server: VllmServer, learner: Learner, path: str) -> None:
    answer = server.post(path, {**BODIES[path], "model": TWIN})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["regrad"]["documents"]) == learner.config.top_k
    assert answer.json()["model"] == TWIN


def test_a_found_document_weighs_less_the_further_its_score_lies_behind_the_best(
    server: VllmServer, learner: Learner
) -> None:
    asked = {"query": "the answer to riddle 17", "top_k": 4}
    used = server.post(
        "/v1/chat/completions", {**BODIES["/v1/chat/completions"], "model": BASE, "regrad": asked}
    ).json()
    documents = used["regrad"]["documents"]
    scores, weights = ([document[name] for document in documents] for name in ("score", "weight"))
    assert scores == sorted(scores, reverse=True) and scores[-1] < scores[0]
    expected = [math.exp((score - scores[0]) / learner.config.score_temperature) for score in scores]
    assert weights == pytest.approx(expected, rel=1e-4) and weights[0] == 1.0 > weights[-1]


@pytest.mark.parametrize("path", BODIES)
def test_the_first_event_of_a_stream_says_what_it_is_made_with(server: VllmServer, path: str) -> None:
    body = {**BODIES[path], "model": TWIN, "stream": True}
    with server.client.stream("POST", path, json=body) as answer:
        events = events_of(answer.iter_lines())
    assert answer.headers["x-regrad-adapter"] == events[0]["regrad"]["adapter"]
    assert len(events) > 2
    assert not any("regrad" in event for event in events[1:])


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_gives_the_same_text_as_one_answer(server: VllmServer, path: str) -> None:
    body = {**BODIES[path], "model": BASE, "temperature": 0, "regrad": {"document_ids": ["doc-3"], "gamma": 1.5}}
    whole = text_of(server.post(path, body).json())
    with server.client.stream("POST", path, json={**body, "stream": True}) as answer:
        events = events_of(answer.iter_lines())
    if path == "/v1/responses":
        pieces = [event["delta"] for event in events if event.get("type") == "response.output_text.delta"]
    elif path == "/v1/completions":
        pieces = [event["choices"][0]["text"] for event in events]
    else:
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == whole


def test_each_of_several_choices_has_the_documents(server: VllmServer) -> None:
    """vLLM gives several choices only to a request that samples. So cold, it samples the likeliest token."""
    regrad, several = {"document_ids": ["doc-5"], "gamma": 4.0}, {"n": 2, "temperature": 1e-4}
    tokens = {
        name: [choice["token_ids"] for choice in server.complete("The harbour", *given, **sampling)["choices"]]
        for name, given, sampling in (
            ("greedy", [regrad], {}), ("choices", [regrad], several), ("without", [], several),
        )
    }  # fmt: skip
    assert tokens["choices"] == tokens["greedy"] * 2
    assert len(tokens["without"]) == 2 and not any(found in tokens["greedy"] for found in tokens["without"])
    assert server.status()["workers"][0]["num_lost"] == 0


PROMPTS = [f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in (7, 42, 99)]


@pytest.mark.parametrize("sampling", [{}, {"n": 2, "temperature": 1.0, "seed": 5}])
def test_each_of_several_prompts_is_answered_with_its_own_documents(
    server: VllmServer, sampling: dict[str, Any]
) -> None:
    regrad, n = {"top_k": 1}, sampling.get("n", 1)
    alone = [server.complete(prompt, regrad, **sampling) for prompt in PROMPTS]
    body = {"model": TWIN, "prompt": PROMPTS, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "regrad": regrad, **sampling}  # fmt: skip
    answer = server.post("/v1/completions", body).json()
    prompts = answer["regrad"]["prompts"]
    assert [prompt["choices"] for prompt in prompts] == [list(range(i * n, (i + 1) * n)) for i in range(3)]
    assert [prompt["documents"][0]["id"] for prompt in prompts] == ["doc-7", "doc-42", "doc-99"]
    assert [prompt["adapter"] for prompt in prompts] == [single["regrad"]["adapter"] for single in alone]
    tokens = [choice["token_ids"] for choice in answer["choices"]]
    assert tokens == [choice["token_ids"] for single in alone for choice in single["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(3 * n))
    assert answer["usage"]["completion_tokens"] == 8 * 3 * n and answer["model"] == TWIN
    assert server.client.get(f"/v1/regrad/requests/{answer['id']}").json() == answer["regrad"]
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", "/v1/completions", json=streaming) as stream:
        events = events_of(stream.iter_lines())
    assert events[0]["regrad"]["prompts"][1]["documents"] == prompts[1]["documents"]
    texts = dict.fromkeys(range(3 * n), "")
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in answer["choices"]]
    assert events[-1]["usage"]["total_tokens"] == answer["usage"]["total_tokens"]


def test_more_prompts_than_the_engine_runs_take_turns(server: VllmServer) -> None:
    prompts = [[f"Fact number {n}: the answer to riddle {n} is {n * 37 % 1000}." for n in range(start, start + 20)]
               for start in (0, 20)]  # fmt: skip
    assert all(len(several) > MAX_NUM_SEQS for several in prompts), "each of the two fills the engine"
    bodies = [{"model": TWIN, "prompt": several, "max_tokens": 4, "regrad": {"top_k": 1}} for several in prompts]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda body: server.post("/v1/completions", body), bodies))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == len({p["adapter"] for p in answer.json()["regrad"]["prompts"]}) == 20
        assert answer.headers["x-regrad-adapter"].endswith(", +16")
    assert eventually(lambda: server.status()["arena"]["num_holds"] == 0)
    assert eventually(lambda: server.status()["workers"][0]["num_admitted"] == 0)


def test_icl_mode_puts_each_prompts_documents_into_it(server: VllmServer, model: Path) -> None:
    body = {"model": TWIN, "prompt": PROMPTS, "max_tokens": 1, "return_token_ids": True,
            "regrad": {"top_k": 1, "mode": "icl"}}  # fmt: skip
    answer = server.post("/v1/completions", body).json()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [str(tokenizer.decode(choice["prompt_token_ids"])) for choice in answer["choices"]]
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert text.count(prompt) == 2, "as the document and as the question"


def test_the_headers_of_an_answer_stay_below_2_kib(server: VllmServer, bank: BankThread) -> None:
    documents = [(f"{n:02d}" + "€" * 84 + "x", f"What long id number {n} names.") for n in range(16)]
    bank.ingest(documents)
    ids = [id for id, _ in documents]
    answer = server.post(
        "/v1/completions",
        {**BODIES["/v1/completions"], "model": TWIN, "regrad": {"document_ids": ids}},
        **{"x-request-id": "i" * 512},
    )
    for id in ids:
        bank.delete(id)
    assert [document["id"] for document in answer.json()["regrad"]["documents"]] == ids
    assert answer.headers["x-regrad-documents"].endswith(", +15")
    assert answer.json()["id"] == "cmpl-" + "i" * 512
    assert sum(len(name) + len(value) + 4 for name, value in answer.headers.raw) + 512 < 2048, "the id may come back"


def test_the_tokenizer_takes_the_twins_name(server: VllmServer) -> None:
    answers = [server.post("/tokenize", {"model": name, "prompt": QUESTION}) for name in (BASE, TWIN)]
    assert answers[0].json() == answers[1].json() and answers[1].json()["count"] > 3
    back = server.post("/detokenize", {"model": TWIN, "tokens": answers[1].json()["tokens"]})
    assert QUESTION in back.json()["prompt"]


def test_retrieval_finds_the_document_that_the_question_is_about(server: VllmServer) -> None:
    answer = server.complete("Something else", {"query": "Fact number 42: the answer to riddle 42 is 554.", "top_k": 1})
    assert [document["id"] for document in answer["regrad"]["documents"]] == ["doc-42"]
    assert answer["regrad"]["documents"][0]["score"] > 0.9


def test_regrad_can_be_switched_off_by_the_request(server: VllmServer) -> None:
    plain = server.complete(QUESTION)
    off = server.complete(QUESTION, {"enabled": False}, model=TWIN)
    assert off["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    assert off["regrad"]["adapter"] is None and "enabled" in off["regrad"]["reason"]


def test_without_a_document_that_scores_high_enough_the_base_model_answers(server: VllmServer) -> None:
    plain = server.complete(QUESTION)
    none = server.complete(QUESTION, {"min_score": 1.0})
    assert none["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    assert none["regrad"]["documents"] == [] and none["regrad"]["adapter"] is None
    assert none["regrad"]["reason"] == "no document scores 1 or more; the base model answers"
    assert not none["regrad"]["fallback"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("regrad", [{"min_score": 1.0}, {"enabled": False}])
def test_an_answer_of_the_base_model_has_the_name_that_was_asked_for(
    server: VllmServer, path: str, regrad: dict[str, Any]
) -> None:
    answer = server.post(path, {**BODIES[path], "model": TWIN, "regrad": regrad}).json()
    assert answer["regrad"]["adapter"] is None
    assert answer["model"] == TWIN


def test_gamma_zero_is_the_learner_alone_whatever_the_documents(server: VllmServer) -> None:
    first = server.complete(QUESTION, {"document_ids": ["doc-1"], "gamma": 0})
    second = server.complete(QUESTION, {"document_ids": ["doc-2"], "gamma": 0})
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
    assert first["regrad"]["adapter"] != second["regrad"]["adapter"]


def test_icl_mode_puts_the_documents_into_the_prompt_as_well(server: VllmServer, model: Path) -> None:
    ids = ["doc-11", "doc-12"]
    blind = server.complete(QUESTION, {"document_ids": ids})
    icl = server.complete(QUESTION, {"document_ids": ids, "mode": "icl"})
    assert icl["regrad"]["adapter"] == blind["regrad"]["adapter"]
    text = str(AutoTokenizer.from_pretrained(model).decode(icl["choices"][0]["prompt_token_ids"]))
    assert text.startswith("Fact number 11") and "Fact number 12" in text and QUESTION in text


def test_the_learners_system_prompt_is_added_where_the_request_brings_none(
    server: VllmServer, learner: Learner
) -> None:
    def prompt(messages: list[dict[str, str]], regrad: bool) -> list[int]:
        body = {"model": TWIN if regrad else BASE, "messages": messages, "max_tokens": 1, "return_token_ids": True}
        return list(server.post("/v1/chat/completions", body).json()["prompt_token_ids"])

    user = {"role": "user", "content": QUESTION}
    ours = {"role": "system", "content": learner.config.prompts.system}
    theirs = {"role": "system", "content": "You are a pirate."}
    assert prompt([user], regrad=True) == prompt([ours, user], regrad=False)
    assert prompt([theirs, user], regrad=True) == prompt([theirs, user], regrad=False)
    assert prompt([user], regrad=False) != prompt([ours, user], regrad=False)


def test_what_a_request_used_can_be_asked_for_later(server: VllmServer) -> None:
    body = {**BODIES["/v1/completions"], "model": TWIN}
    answer = server.post("/v1/completions", body, **{"x-request-id": "mine-1"}).json()
    assert server.client.get("/v1/regrad/requests/mine-1").json() == answer["regrad"]
    assert server.client.get(f"/v1/regrad/requests/{answer['id']}").json() == answer["regrad"]
    missing = server.client.get("/v1/regrad/requests/never-seen")
    assert missing.status_code == 404 and "request_id" in missing.json()["error"]["message"]


def test_a_deleted_document_is_gone_with_the_next_request(server: VllmServer, bank: BankThread) -> None:
    text = "The lighthouse keeper of Ystrad is called Ottoline."
    bank.ingest([("passing", text)])
    found = server.complete("x", {"query": text, "top_k": 1})
    assert found["regrad"]["documents"][0]["id"] == "passing"
    bank.delete("passing")
    after = server.complete("x", {"query": text, "top_k": 3})
    assert "passing" not in [document["id"] for document in after["regrad"]["documents"]]


def test_an_updated_document_gives_another_adapter(server: VllmServer, bank: BankThread) -> None:
    bank.ingest([("changing", "The shop opens at nine.")])
    before = server.complete(QUESTION, {"document_ids": ["changing"]})["regrad"]
    bank.ingest([("changing", "The shop opens at ten.")])
    after = server.complete(QUESTION, {"document_ids": ["changing"]})["regrad"]
    assert after["documents"][0]["version"] == before["documents"][0]["version"] + 1
    assert after["adapter"] != before["adapter"]


def test_a_request_without_a_key_never_reaches_the_bank(server: VllmServer) -> None:
    before = server.status()["arena"]
    body = {"model": TWIN, "prompt": "x", "regrad": {"document_ids": ["doc-149"]}}
    answer = server.post("/v1/completions", body, authorization="Bearer wrong")
    assert answer.status_code == 401
    assert server.status()["arena"] == before


def nothing_is_held(server: VllmServer) -> bool:
    worker = server.status()["workers"][0]
    return bool(worker["num_admitted"] == worker["num_running"] == worker["pool_num_held"] == 0)


def test_nothing_grows_with_the_number_of_requests(server: VllmServer) -> None:
    first = server.status()
    before = first["workers"][0]
    for number in range(75):  # with 150 documents; the arena has room for fewer
        server.complete("a", {"document_ids": [f"doc-{2 * number}", f"doc-{2 * number + 1}"]}, max_tokens=1)
    status = server.status()
    arena, worker = status["arena"], status["workers"][0]
    assert arena["used_bytes"] <= arena["max_bytes"] and arena["num_evictions"] > 0
    assert arena["num_held"] == arena["num_holds"] == 0
    assert {worker["num_registered"], worker["num_active"]} <= {1, 2}, "φ*, and an operator's adapter"
    assert worker["num_late"] == worker["num_lost"] == 0
    assert eventually(lambda: nothing_is_held(server))
    assert worker["pool_used_bytes"] <= worker["pool_max_bytes"] and worker["pool_num_evictions"] > 0
    assert status["num_kept_requests"] == 40 and status["num_releases_waiting"] == 0
    assert status["server"]["num_open_files"] <= first["server"]["num_open_files"] + 2
    assert worker["num_open_files"] == before["num_open_files"]
    metrics = server.client.get("/metrics").text
    assert 'regrad_requests_total{mode="blind",outcome="adapter"}' in metrics
    assert eventually(lambda: "\nregrad_arena_holds 0.0\n" in server.client.get("/metrics").text), "the figure of now"
    assert "regrad_resident_ms_bucket" in metrics
    for level in ('regrad_arena_lookups_total{result="miss"}', 'regrad_worker_lookups{result="miss",worker="0/0"}',
                  'regrad_worker_bytes{worker="0/0"}', "regrad_arena_bytes "):  # fmt: skip
        (value,) = [line.split()[-1] for line in metrics.splitlines() if line.startswith(level)]
        assert float(value) > 0, level
    for name in ("late", "lost"):
        assert f'regrad_worker_{name}{{worker="0/0"}} 0.0' in metrics.splitlines()
    series = [line for line in metrics.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert 0 < len(series) <= 4, series
