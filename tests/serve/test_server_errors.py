"""Errors over the wire: each names its field, and every other request goes on unharmed."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.exceptions import RedisError

from bank_service.bank import Bank
from bank_service.values.documents import Query, QueryResult
from tests.serve.support import BASE, BankThread, VllmServer, random_learner

TWIN = BASE + "-regrad"
NAN, INF = "@NaN@", "@Infinity@"  # spelled into the JSON text: no library writes them for us


def post_raw(server: VllmServer, body: dict[str, Any]) -> Any:
    text = json.dumps(body).replace(f'"{NAN}"', "NaN").replace(f'"{INF}"', "Infinity").replace('"-Inf"', "-Infinity")
    return server.client.post("/v1/completions", content=text, headers={"content-type": "application/json"})


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == status
    return error


def eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("regrad", "field"),
    [
        ("on", "regrad"), ([], "regrad"), ({"unknown": 1}, "regrad.unknown"),
        ({"top_k": 0}, "regrad.top_k"), ({"top_k": -1}, "regrad.top_k"), ({"top_k": 10**9}, "regrad.top_k"),
        ({"top_k": True}, "regrad.top_k"), ({"top_k": 1.5}, "regrad.top_k"),
        ({"gamma": NAN}, "regrad.gamma"), ({"gamma": INF}, "regrad.gamma"), ({"gamma": "-Inf"}, "regrad.gamma"),
        ({"gamma": 1e9}, "regrad.gamma"), ({"mode": "raw"}, "regrad.mode"), ({"min_score": 2}, "regrad.min_score"),
        ({"document_ids": []}, "regrad.document_ids"), ({"namespace": "a/b"}, "regrad.namespace"),
    ],
)  # fmt: skip
def test_a_bad_option_is_a_400_that_names_it(server: VllmServer, regrad: object, field: str) -> None:
    error = error_of(post_raw(server, {"model": BASE, "prompt": "x", "max_tokens": 1, "regrad": regrad}), 400)
    assert error["param"] == field and field in error["message"] and error["type"] == "BadRequestError"


@pytest.mark.parametrize(
    ("regrad", "field", "name"),
    [
        ({"namespace": "nobody"}, "regrad.namespace", "nobody"),
        ({"document_ids": ["doc-1", "no-such"]}, "regrad.document_ids", "no-such"),
    ],
)
def test_what_the_bank_does_not_have_is_a_404(
    server: VllmServer, regrad: dict[str, Any], field: str, name: str
) -> None:
    error = error_of(post_raw(server, {"model": TWIN, "prompt": "x", "max_tokens": 1, "regrad": regrad}), 404)
    assert error["param"] == field and name in error["message"]


def test_several_prompts_share_the_documents_that_the_request_names(server: VllmServer) -> None:
    body = {"model": TWIN, "prompt": ["a", "b"], "max_tokens": 1}
    answer = post_raw(server, {**body, "regrad": {"query": "riddle 3"}})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 2
    assert answer.json()["regrad"]["adapter"]


def test_what_goes_wrong_with_one_of_several_prompts_is_the_requests_error(server: VllmServer) -> None:
    too_long = {"model": TWIN, "prompt": ["a", "word " * 3000], "max_tokens": 1}
    error_of(post_raw(server, too_long), 400)
    assert error_of(post_raw(server, {**too_long, "prompt": ["a"] * 65}), 400)["param"] == "prompt"
    assert eventually(lambda: server.status()["arena"]["num_holds"] == 0)
    assert eventually(lambda: server.status()["workers"][0]["num_admitted"] == 0)


def test_a_client_that_hangs_up_lets_go_of_what_all_its_prompts_hold(server: VllmServer) -> None:
    prompts = [f"Tell a long story of riddle {n}." for n in range(20)]
    body = {"model": TWIN, "prompt": prompts, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept, because httpx hangs up when it goes
        next(lines)
        assert server.status()["arena"]["num_holds"] == 20
    assert eventually(lambda: server.status()["arena"]["num_holds"] == 0)
    assert eventually(lambda: server.status()["workers"][0]["num_admitted"] == 0)
    status = server.status()
    assert status["arena"]["num_held"] == status["num_releases_waiting"] == 0
    assert server.complete("x", {"document_ids": ["doc-1"]})["regrad"]["adapter"]


def test_a_response_in_the_background_can_not_hold_gradients(server: VllmServer) -> None:
    answer = server.post("/v1/responses", {"model": TWIN, "input": "x", "background": True})
    assert error_of(answer, 400)["param"] == "background"


def test_an_unknown_model_is_vllms_own_404(server: VllmServer) -> None:
    answer = post_raw(server, {"model": "nobody", "prompt": "x", "regrad": {}})
    assert "nobody" in error_of(answer, 404)["message"]


def test_bodies_that_are_not_plain_json_are_refused_by_vllm(server: VllmServer) -> None:
    body = json.dumps({"model": TWIN, "prompt": "x", "max_tokens": 1}).encode()
    for content, headers in (
        (b"{broken", {"content-type": "application/json"}),
        (b"[1, 2]", {"content-type": "application/json"}),
        (gzip.compress(body), {"content-type": "application/json", "content-encoding": "gzip"}),
        (body, {"content-type": "text/plain"}),
    ):
        answer = server.client.post("/v1/completions", content=content, headers=headers)
        assert 400 <= answer.status_code < 500, answer.text


def test_a_huge_body_is_refused_before_it_is_read_to_the_end(server: VllmServer) -> None:
    content = b'{"model": "base", "prompt": "' + b"x" * (65 * 2**20) + b'"}'
    answer = server.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert error_of(answer, 413)["type"] == "RequestTooLargeError"


def test_a_request_that_vllm_refuses_leaves_nothing_behind(server: VllmServer) -> None:
    body = {"model": TWIN, "prompt": "word " * 3000, "max_tokens": 1}
    error_of(post_raw(server, {**body, "regrad": {"document_ids": ["doc-5"], "gamma": 0.31}}), 400)
    assert eventually(lambda: server.status()["arena"]["num_holds"] == 0)
    assert eventually(lambda: server.status()["workers"][0]["num_admitted"] == 0)


def test_a_client_that_hangs_up_lets_go_of_what_it_holds_when_the_engine_is_done(server: VllmServer) -> None:
    body = {"model": TWIN, "prompt": ["Tell a long story."] * 12, "max_tokens": 900, "ignore_eos": True}  # seconds
    with ThreadPoolExecutor(1) as pool:
        for seconds in (0.5, 2.0):  # a busy machine may hold nothing yet after the first
            held = pool.submit(eventually, lambda: server.status()["arena"]["num_held"] > 0)
            with pytest.raises(httpx.ReadTimeout):
                server.client.post("/v1/completions", json=body, timeout=seconds)
            if held.result():
                break
        assert held.result()
    assert eventually(lambda: server.status()["arena"]["num_holds"] == 0)
    status = server.status()
    assert status["arena"]["num_held"] == 0 and status["num_releases_waiting"] == 0
    assert server.complete("x", {"document_ids": ["doc-1"]})["regrad"]["adapter"]


def test_a_bad_request_harms_no_other_in_its_batch(server: VllmServer) -> None:
    alone = server.complete("The moon", {"document_ids": ["doc-20"]}, max_tokens=16)["choices"][0]["token_ids"]
    bad = {"model": TWIN, "prompt": "x", "max_tokens": 1, "regrad": {"document_ids": ["no-such"]}}
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(server.complete, "The moon", {"document_ids": ["doc-20"]}, max_tokens=16) for _ in range(4)]
        statuses = [answer.status_code for answer in pool.map(lambda _: post_raw(server, bad), range(4))]
    assert statuses == [404] * 4
    assert all(answer.result()["choices"][0]["token_ids"] == alone for answer in good)


def test_a_damaged_gradient_is_one_requests_error_and_fetched_anew(server: VllmServer) -> None:
    used = server.complete("x", {"document_ids": ["doc-77"]})["regrad"]
    others = [f"doc-{number}" for number in range(120) if number != 77][:112]
    for start in range(0, 112, 8):  # WORKER_RECORDS < 112 < ARENA_RECORDS: the worker must read doc-77's again
        server.complete("x", {"document_ids": others[start : start + 8]}, max_tokens=1)
    path = Path(server.status()["arena"]["folder"]) / used["documents"][0]["gradient_digest"]
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    body = {"model": BASE, "prompt": "x", "max_tokens": 1, "regrad": {"document_ids": ["doc-77"], "gamma": 0.77}}
    assert "made resident" in error_of(post_raw(server, body), 503)["message"]
    assert post_raw(server, body).status_code == 200


def test_an_emptied_or_killed_redis_of_the_bank_costs_no_answer(server: VllmServer, bank: BankThread) -> None:
    texts = [(f"cache-{n}", f"What the cache of number {n} forgets.") for n in range(2)]
    bank.ingest(texts)
    redis = bank.redis()
    try:
        redis.flushall()
        assert server.complete("x", {"document_ids": ["cache-0"]})["regrad"]["adapter"]
        os.kill(int(redis.info("server")["process_id"]), signal.SIGKILL)
        assert server.complete("x", {"document_ids": ["cache-1"]})["regrad"]["adapter"]
    finally:
        redis.close()
        for id, _ in texts:
            bank.delete(id)


def test_a_gradient_that_the_bank_lost_is_made_again_or_a_503_that_names_it(
    server: VllmServer, bank: BankThread
) -> None:
    (own,) = bank.ingest([("own", "What the disk lost and the bank can make again.")])
    digest = bank.upload("lost", "What the disk lost.")
    for lost in (own, digest):
        bank.lose(lost)

    def emptied() -> bool:  # the server may be starting anew after another test
        try:
            with bank.redis() as redis:
                return bool(redis.flushall())
        except RedisError:
            return False

    assert eventually(emptied)
    try:
        body = {"model": BASE, "prompt": "x", "max_tokens": 1, "regrad": {"document_ids": ["lost"]}}
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(server.complete, "The moon", {"document_ids": ["doc-21"]}, max_tokens=16)
            error = error_of(post_raw(server, body), 503)
            assert beside.result()["regrad"]["adapter"]
        assert digest in error["message"]
        assert server.complete("x", {"document_ids": ["own"]})["regrad"]["documents"][0]["gradient_digest"] == own
    finally:
        bank.delete("lost")
        bank.delete("own")
    assert server.status()["arena"]["num_holds"] == 0


def test_without_the_bank_only_those_who_asked_for_regrad_are_refused(server: VllmServer, bank: BankThread) -> None:
    plain = server.complete("The sun")["choices"][0]["token_ids"]
    bank.stop()
    try:
        for body in ({"model": TWIN}, {"model": BASE, "regrad": {}}):
            error = error_of(post_raw(server, {**body, "prompt": "The sun", "max_tokens": 1}), 503)
            assert error["type"] == "ServiceUnavailableError" and bank.address in error["message"]
        assert server.complete("The sun")["choices"][0]["token_ids"] == plain
        assert server.status()["bank"]["available"] is False
    finally:
        bank.start()
    assert eventually(lambda: post_raw(server, {"model": TWIN, "prompt": "a", "max_tokens": 1}).status_code == 200)


def test_a_bank_of_another_learner_is_a_409_that_names_both(
    server: VllmServer, bank: BankThread, model: Path, tmp_path: Path
) -> None:
    other = random_learner(model, seed=2)
    bank.stop()
    stranger = BankThread(tmp_path / "other", other, port=bank.port)
    try:
        stranger.start()
        stranger.ingest([("doc-1", "A document of another bank.")])
        ask = {"model": TWIN, "prompt": "x", "max_tokens": 1}
        assert eventually(lambda: post_raw(server, ask).status_code != 503)
        error = error_of(post_raw(server, ask), 409)
        own = server.status()["learner"]["fingerprint"]
        assert f"this server's learner {own}, it holds those of {other.fingerprint}" in error["message"]
    finally:
        stranger.stop()
        bank.start()
    assert eventually(lambda: post_raw(server, {"model": TWIN, "prompt": "a", "max_tokens": 1}).status_code == 200)


def test_a_bank_that_does_not_answer_holds_nobody_up_who_does_not_need_it(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    query = Bank.query

    async def slow(self: Bank, wanted: Query) -> QueryResult:
        asked.set()
        await asyncio.to_thread(answer.wait, 20)
        return await query(self, wanted)

    active = {"document_ids": ["doc-40"]}
    known = server.complete("Tell me.", active)["regrad"]["adapter"]
    body = {"model": BASE, "prompt": "Tell a story.", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(4) as pool, server.client.stream("POST", "/v1/completions", json=body) as story:
        lines = story.iter_lines()
        next(lines)  # it decodes already
        monkeypatch.setattr(Bank, "query", slow)
        waiting = [pool.submit(server.complete, "x", {"document_ids": [f"doc-{n}"]}) for n in (41, 42, 43)]
        assert asked.wait(20)
        for _ in range(3):
            server.complete("Someone else's prompt.", max_tokens=4)
        for _ in range(40):
            next(lines)
        assert not any(request.done() for request in waiting), "they need the bank"
        answer.set()
        assert all(request.result()["regrad"]["adapter"] != known for request in waiting)
