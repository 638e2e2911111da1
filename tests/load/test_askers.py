"""The requests of each contender, to a server that records them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from regrad_vllm.client import Answer, CueSentence, Hit, Query
from regrad_vllm.data.questions import Question
from regrad_vllm.load.askers import STATIC_ADAPTER, TUNED_ADAPTER, Attempt, Passages, Served
from regrad_vllm.load.comparison import CONTENDERS, Contender, LoadCondition
from regrad_vllm.load.streaming import AnswerError
from regrad_vllm.prompts import Prompts
from tests.load.made import condition

PROMPTS = Prompts(system="Be short.", document="{title}: {text}", document_untitled="{text}", blind="Q {question}",
                  icl="{documents} / {question}")  # fmt: skip
QUESTION = Question("q", "who?", ("Ada",), ("a",), "set")
PARTS = {"long": {"a": ("a#1", "a#2"), "b": ("b",), "c": ("c",)}}
BYTES = {"natural": {"a": 10, "b": 20}, "long": {"a#1": 1, "a#2": 2, "b": 4, "c": 8}}


class Bank:
    """Finds "a", then "b"; knows every id."""

    def __init__(self) -> None:
        self.asked: list[Query] = []

    async def query(self, query: Query) -> Answer:
        self.asked.append(query)
        found = query.document_ids or (("a", "b") if query.namespace == "natural" else ("a#2", "a#1", "b"))
        limit = len(found) if query.document_ids else query.top_k
        scores = (0.8, 0.9) if query.with_cue > 1 else (0.9,) if query.with_cue else ()
        cues = [
            (CueSentence(0, 5, f"cue of {id}", score),) for id, score in zip(found[:limit], scores, strict=False)
        ] + [() for _ in found]
        hits = (
            Hit(id, 1, 0.9, 0.9, "0" * 64, 5, "T", f"text of {id}" if query.with_text else "", cue)
            for id, cue in zip(found[:limit], cues, strict=False)
        )
        return Answer(tuple(hits), 1)


def sent(
    asking: str | Contender, own: LoadCondition, adapter: str | None = "regrad-x"
) -> tuple[dict[str, Any], Attempt, Bank]:
    """(body, attempt, bank) of one request."""
    contender = CONTENDERS[asking] if isinstance(asking, str) else asking
    app, bodies, bank, attempt = FastAPI(), [], Bank(), Attempt()

    @app.post("/v1/chat/completions", response_model=None)
    async def answer(body: dict[str, Any]) -> Response:
        bodies.append(body)
        used = {"adapter": adapter, "reason": "none", "documents": [{"id": "a"}], "timings_ms": {"resident": 3.0}}
        used["cue"] = [{"text": "seven b"}] if body.get("regrad", {}).get("mode") == "cue" else []
        events = [
            {"regrad": used, "choices": [{"delta": {"content": "Ada"}}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        ]
        return StreamingResponse(f"data: {json.dumps(event)}\n\n" for event in events)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            passages = Passages(bank, PROMPTS, PARTS, BYTES)  # type: ignore[arg-type]
            await Served(client, "m", PROMPTS, passages).ask(QUESTION, contender, own, attempt)

    asyncio.run(run())
    return bodies[0], attempt, bank


SERVED = [name for name, contender in CONTENDERS.items() if contender.engine == "regrad"]


@pytest.mark.parametrize("name", SERVED)
def test_sampling_and_the_system_prompt_are_the_same_for_all(name: str) -> None:
    body, attempt, _ = sent(name, condition(top_k=2))
    assert (body["temperature"], body["max_tokens"], body["ignore_eos"]) == (0, 4, True)
    assert body["messages"][0] == {"role": "system", "content": "Be short."} and len(body["messages"]) == 2
    assert "cache_salt" not in body and attempt.stream.ended is not None
    free, _, _ = sent(name, condition(top_k=2, output_tokens=0, prefix_cache=False))
    assert free["max_tokens"] == 32 and "ignore_eos" not in free
    assert free["cache_salt"] != sent(name, condition(prefix_cache=False))[0]["cache_salt"]


def test_closed_book_asks_nobody_and_has_no_adapter() -> None:
    body, attempt, bank = sent("base", condition())
    assert body["model"] == "m" and body["regrad"] == {"enabled": False} and not bank.asked
    assert body["messages"][1]["content"] == "Q who?" and attempt.documents == ()
    static, _, bank = sent("learner", condition())
    assert static["model"] == STATIC_ADAPTER and "regrad" not in static and not bank.asked


@pytest.mark.parametrize("name", ["rag", "rag_learner"])
def test_rag_shows_what_the_bank_found_best_first(name: str) -> None:
    body, attempt, bank = sent(name, condition(top_k=2))
    (query,) = bank.asked
    assert (query.text, query.top_k, query.min_score) == ("who?", 2, -1.0)
    assert "T: text of a" in body["messages"][1]["content"] and body["messages"][1]["content"].endswith("/ who?")
    assert attempt.documents == ("a", "b") and attempt.moved_bytes == 30 and attempt.retrieve_ms > 0
    assert body["model"] == ("m" if name == "rag" else STATIC_ADAPTER)


def test_regrad_leaves_the_asking_to_the_server() -> None:
    body, attempt, bank = sent("regrad", condition(top_k=2))
    assert body["regrad"] == {"namespace": "natural", "mode": "blind", "query": "who?", "top_k": 2, "min_score": -1.0}
    assert not bank.asked and attempt.documents == ("a",) and attempt.moved_bytes == 0
    icl, attempt, _ = sent("regrad_icl", condition(top_k=2))
    assert icl["regrad"]["mode"] == "icl" and icl["regrad"]["gamma"] != 1, "no adapter of ReGrad's is used again"
    assert attempt.moved_bytes == 10


@pytest.mark.parametrize("corpus", ["natural", "long"])
def test_sentences_come_from_the_bank_or_the_server(corpus: str) -> None:
    own = condition(corpus=corpus, passage_tokens=300 if corpus == "long" else 0, top_k=2)
    body, attempt, bank = sent("rag_sentence", own)
    assert (bank.asked[-1].with_cue, bank.asked[-1].cue_text, bank.asked[-1].with_text) == (2, "who?", False)
    near, far = ("cue of b", "cue of a") if corpus == "natural" else ("cue of a#2", "cue of a#1")
    shown = PROMPTS.render_icl("who?", [f"T: {near}", f"T: {far}"])
    assert body["messages"][1]["content"] == shown and body["regrad"] == {"enabled": False}
    assert attempt.moved_bytes == len(near) + len(far)
    tuned, _, _ = sent("ft_rag_sentence", own)
    assert tuned["messages"] == body["messages"] and tuned["model"] == TUNED_ADAPTER and "regrad" not in tuned
    regrad, attempt, bank = sent("regrad_cue", own)
    assert (regrad["regrad"]["mode"], regrad["regrad"]["cue_sentences"]) == ("cue", 2)
    assert regrad["regrad"]["gamma"] not in (1, sent("regrad_icl", own)[0]["regrad"]["gamma"])
    assert regrad["messages"][1]["content"] == "Q who?" and attempt.moved_bytes == len("seven b")
    assert not any(query.with_cue for query in bank.asked)
    one = replace(CONTENDERS["rag_sentence"], cue_sentences=1)
    assert sent(one, own)[2].asked[-1].with_cue == 1
    auto = sent(replace(CONTENDERS["regrad_cue"], cue_sentences=3, asks_again=True), own)[0]["regrad"]
    assert (auto["mode"], auto["cue_sentences"]) == ("auto", 3)


def test_a_long_document_is_all_its_passages_for_both() -> None:
    own = condition(phase="growth", corpus="long", passage_tokens=300, top_k=2)
    body, attempt, bank = sent("regrad", own)
    assert body["regrad"]["document_ids"] == ["a#1", "a#2", "b"] and attempt.retrieve_ms > 0
    rag, attempt, _ = sent("rag_learner", own)
    assert attempt.documents == ("a#1", "a#2", "b") and attempt.moved_bytes == 7
    assert rag["messages"][1]["content"].index("text of a#1") < rag["messages"][1]["content"].index("text of a#2")
    assert len(bank.asked) == 2
    few = condition(phase="growth", corpus="long", passage_tokens=300, top_k=3)
    assert sent("regrad", few)[0]["regrad"]["document_ids"] == ["a#1", "a#2", "b", "c"], "filled up where hits are few"


def test_an_answer_without_an_adapter_is_no_answer_of_regrads() -> None:
    with pytest.raises(AnswerError, match="without an adapter: none"):
        sent("regrad", condition(), adapter=None)
