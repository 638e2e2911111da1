"""Lexical and hybrid retrieval through the middleware: documents by words, weights by cosines."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from regrad_vllm.client import AsyncBank, Bank, Condition, Document, Query
from regrad_vllm.client.values import Retrieval
from regrad_vllm.learner import Learner
from regrad_vllm.serve.api.preparer import no_hits
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread

QUESTION = "the answer to riddle 33"


@pytest.mark.parametrize("retrieval", ["lexical", "hybrid"])
def test_weights_are_made_of_cosines_where_scores_are_none(
    bank: BankThread, learner: Learner, tmp_path: Path, retrieval: Retrieval
) -> None:
    assert learner.config.score_temperature, "else all weights are 1"

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse({})

    async def run() -> None:
        client = AsyncBank(bank.address, spec=learner.spec)
        hits = (await client.query(Query(QUESTION, top_k=3, retrieval=retrieval))).hits
        await client.close()
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, _, _):
            regrad = {"query": QUESTION, "top_k": 3, "retrieval": retrieval}
            answer = await http.post("/v1/completions", json={"model": "base", "prompt": "x", "regrad": regrad})
            assert answer.status_code == 200, answer.text
        used = answer.json()["regrad"]["documents"]
        assert [document["id"] for document in used] == [hit.id for hit in hits] and hits[0].id == "doc-33"
        for document, hit in zip(used, hits, strict=True):
            assert abs(hit.score - hit.cosine) > 0.01
            expected = math.exp(min(0.0, hit.cosine - hits[0].cosine) / learner.config.score_temperature)
            assert document["weight"] == pytest.approx(expected, abs=1e-5)
            assert document["score"] == pytest.approx(hit.score, abs=1e-5)

    asyncio.run(run())


def test_a_filter_in_the_request_keeps_to_the_documents_that_match(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    with Bank(bank.address) as client:
        documents = [Document(lang, f"{QUESTION} in {lang}", metadata={"lang": lang}) for lang in ("de", "fr", "en")]
        assert len(list(client.ingest(documents, namespace="filtered"))) == 3

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse({"adapter": lora_name})

    async def run() -> None:
        adapters = {}
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, _, _):
            for operator, values, ids in (
                ("equals", ["de", "fr"], {"de", "fr"}),
                ("not_equals", ["de", "fr"], {"en"}),
                ("present", [], {"de", "fr", "en"}),
            ):
                condition = {"key": "lang", "operator": operator, "values": values}
                regrad = {"namespace": "filtered", "query": QUESTION, "top_k": 3, "filter": [condition]}
                answer = await http.post("/v1/completions", json={"model": "base", "prompt": "x", "regrad": regrad})
                assert answer.status_code == 200, answer.text
                assert {document["id"] for document in answer.json()["regrad"]["documents"]} == ids
                adapters[operator] = answer.json()["adapter"]
        assert len(set(adapters.values())) == 3, "other documents, another adapter"

    asyncio.run(run())


def test_a_question_behind_a_long_log_is_searched_for_and_the_answer_says_so(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    lines = [f"2026-11-29 worker WARN connection reset by peer, retry {n} in {n * 7} ms" for n in range(200)]

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse({})

    async def run() -> None:
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, _, _):

            async def used(text: str) -> Any:
                body = {"model": "base", "prompt": text, "regrad": {"top_k": 1}}
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()["regrad"]

            alone, behind = await used(QUESTION), await used("\n".join([*lines, QUESTION]))
            assert behind["documents"] == alone["documents"] != []
            assert alone["query"] == QUESTION
            assert behind["query"].startswith(lines[0]) and behind["query"].endswith("\n" + QUESTION)
            assert len(behind["query"]) < 600
            body = {"model": "base", "prompt": "x", "regrad": {"document_ids": ["doc-1"]}}
            assert (await http.post("/v1/completions", json=body)).json()["regrad"]["query"] is None

    asyncio.run(run())


def test_a_request_as_of_an_earlier_sequence_gets_the_documents_of_then(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    def put(id: str, text: str) -> int:
        with Bank(bank.address) as client:
            (receipt,) = client.ingest([Document(id, text)], namespace="times")
        return receipt.sequence

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse({})

    async def run() -> None:
        async with serving(bank, learner, tmp_path, EngineLists(), handler) as (http, _, _, _):

            async def ask(**regrad: object) -> Any:
                regrad = {"namespace": "times", "query": QUESTION, "top_k": 3, **regrad}
                body = {"model": "base", "prompt": "x", "regrad": regrad}
                return (await http.post("/v1/completions", json=body)).json()

            def used(answer: Any) -> tuple[set[str], int]:
                return {document["id"] for document in answer["regrad"]["documents"]}, answer["regrad"]["sequence"]

            first, second = put("a", QUESTION), put("b", QUESTION + " again")
            assert used(await ask()) == ({"a", "b"}, second)
            assert used(await ask(as_of=first)) == ({"a"}, first)
            error = (await ask(as_of=second + 1))["error"]
            assert (error["code"], error["param"]) == (400, "regrad.as_of")
            assert f"must be at most {second}" in error["message"]
            error = (await ask(as_of=second, retrieval="hybrid"))["error"]
            assert (error["code"], error["param"]) == (400, "regrad.retrieval")
            changed = put("a", "another text")
            error = (await ask(as_of=first))["error"]
            assert (error["code"], error["param"]) == (400, "regrad.as_of")
            assert f"must be at least {changed}" in error["message"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no document is there"),
        ({"min_score": 0.5}, "no document scores 0.5 or more"),
        ({"retrieval": "lexical"}, "no document has a word of the query"),
        (
            {"conditions": (Condition("set", "present", ()),), "as_of": 0, "min_score": -0.25},
            "no document was there then and matches the filter and scores -0.25 or more",
        ),
    ],
)
def test_where_no_document_is_used_the_reason_says_what_one_would_have_had_to_meet(
    fields: dict[str, Any], reason: str
) -> None:
    assert no_hits(Query("x", **fields)) == f"{reason}; the base model answers"
