"""Lexical and hybrid retrieval through the middleware: documents by words, weights by cosines."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse

from regrad_vllm.adapt.bank_client import BankClient, Query
from regrad_vllm.learner import Learner
from regrad_vllm.naming import Retrieval
from tests.serve.support import BankThread
from tests.serve.test_releases import EngineLists, serving

QUESTION = "the answer to riddle 33"


@pytest.mark.parametrize("retrieval", ["lexical", "hybrid"])
def test_weights_are_made_of_cosines_where_scores_are_none(
    bank: BankThread, learner: Learner, tmp_path: Path, retrieval: Retrieval
) -> None:
    assert learner.config.score_temperature, "else all weights are 1"

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        return JSONResponse({})

    async def run() -> None:
        client = BankClient(bank.address, learner.spec, 30_000)
        hits = await client.query(Query("default", text=QUESTION, top_k=3, retrieval=retrieval))
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
