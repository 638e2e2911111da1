"""Where the server's mode can't be had: the request runs in mode blind and says so, or it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse

from regrad_vllm.client import AsyncBank
from regrad_vllm.learner import Learner
from tests.client.older_bank import without_cues
from tests.serve.api.test_releases import EngineLists, serving
from tests.serve.support import BankThread

QUESTION = "Fact number 1: the answer to riddle 1 is 37."
DOCUMENTS = {"document_ids": ["doc-1"]}


def answers(
    thread: BankThread, learner: Learner, folder: Path, *bodies: dict[str, Any], **settings: Any
) -> list[tuple[httpx.Response, Any]]:
    """Each answer, with the prompt that vLLM got. None: it got no request."""
    got: list[Any] = []

    async def handler(body: dict[str, Any], lora_name: str) -> JSONResponse:
        got.append(body["prompt"])
        return JSONResponse({})

    async def run() -> list[tuple[httpx.Response, Any]]:
        found = []
        async with serving(thread, learner, folder, EngineLists(), handler, **settings) as (http, _, _, _):
            for body in bodies:
                answer = await http.post("/v1/completions", json={"model": "base", "prompt": QUESTION, **body})
                found.append((answer, got.pop() if got else None))
        return found

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_many_prompts_that_share_documents_run_blind_where_the_mode_is_the_servers(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    prompts = [f"prompt {number}" for number in range(100)]
    asked, own = answers(
        bank, learner, tmp_path,
        {"prompt": prompts, "regrad": DOCUMENTS}, {"prompt": prompts, "regrad": {**DOCUMENTS, "mode": "icl"}},
        mode="icl",
    )  # fmt: skip
    used = asked[0].json()["regrad"]
    assert used["adapter"] and (used["mode"], used["fallback"], asked[1]) == ("blind", False, prompts)
    assert used["reason"].startswith("the mode is blind and not the server's icl: with more than 64 prompts")
    assert own[0].status_code == 400 and own[0].json()["error"]["param"] == "regrad.mode" and own[1] is None


def test_a_bank_without_cues_gives_documents_and_the_answer_says_that_the_mode_is_blind(
    bank: BankThread, learner: Learner, tmp_path: Path
) -> None:
    ((cued, prompt),) = answers(bank, learner, tmp_path, {"regrad": DOCUMENTS}, mode="cue")
    assert cued.json()["regrad"]["mode"] == "cue" and prompt != QUESTION
    with without_cues(bank.address) as older:
        bodies = [{"regrad": DOCUMENTS}, {"regrad": {**DOCUMENTS, "mode": "cue"}}, {"regrad": {}}, {"regrad": None}]
        by_server, by_request, searched, by_default = answers(
            bank, learner, tmp_path, *bodies, mode="cue", default=True, bank=older
        )
        for answer, prompt in (by_server, searched, by_default):
            used = answer.json()["regrad"]
            assert used["adapter"] and (used["mode"], used["cue"], used["fallback"]) == ("blind", [], False)
            assert used["reason"].startswith("the mode is blind and not the server's cue:")
            assert "update the bank" in used["reason"] and older in used["reason"] and prompt == QUESTION
        assert by_server[0].json()["regrad"]["adapter"] == cued.json()["regrad"]["adapter"]
        for answer, prompt in [by_request, *answers(
            bank, learner, tmp_path, *bodies, mode="cue", default=True, bank=older, on_error="fail_closed"
        )]:  # fmt: skip
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], prompt) == (503, "regrad.mode", None)
            assert "update the bank" in error["message"] and older in error["message"]


def test_a_document_that_is_updated_before_its_gradient_is_fetched_leaves_the_reason_as_it_was(
    bank: BankThread, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = bank.ingest([("moves", "The market is on Mondays.")])
    fetched: list[str] = []
    fetch = AsyncBank.fetch

    async def fetch_late(self: AsyncBank, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
        if not fetched:
            await asyncio.to_thread(bank.ingest, [("moves", "The market is on Fridays.")])
        fetched.extend(digests)
        async for digest, record in fetch(self, digests):
            yield digest, record

    monkeypatch.setattr(AsyncBank, "fetch", fetch_late)
    with without_cues(bank.address) as older:
        body = {"regrad": {"document_ids": ["moves"]}}
        ((answer, prompt),) = answers(bank, learner, tmp_path, body, mode="cue", bank=older)
    bank.delete("moves")
    used = answer.json()["regrad"]
    assert len(fetched) == 2 and fetched[0] == old != fetched[1] == used["documents"][0]["gradient_digest"]
    assert used["reason"].startswith("the mode is blind and not the server's cue:") and prompt == QUESTION
