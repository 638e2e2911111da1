"""Few KV blocks and a small pool: preemption, hang-ups, updates, a full pool. Those who stay notice nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from regrad_vllm.learner import Learner
from tests.serve.support import API_KEY, BASE, BankThread, VllmServer, record_bytes
from tests.serve.test_server_errors import eventually

pytestmark = pytest.mark.only_test_all

NUM_BLOCKS, BLOCK_TOKENS, NUM_SEQS = 20, 128, 32
POOL_DOCUMENTS = 40
LONG = " ".join(f"Line {n} of a list that goes on." for n in range(11))  # almost a block


@pytest.fixture(scope="module")
def small(
    small_model: Path,
    learner_folder: Path,
    learner: Learner,
    bank: BankThread,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VllmServer]:
    """A server whose KV cache is too small for all requests that it may run."""
    if learner.layout.num_values > 200_000:
        pytest.skip("the small model's learner is served")
    folder = tmp_path_factory.mktemp("small-server")
    flags = [
        "--learner", str(learner_folder), "--bank", bank.address, "--regrad-arena-dir", str(folder),
        "--regrad-worker-bytes", str(POOL_DOCUMENTS * record_bytes(learner)), "--regrad-bank-timeout-ms", "30000",
        "--regrad-mode", "blind", "--served-model-name", BASE, "--api-key", API_KEY, "--dtype", "float32",
        "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", str(NUM_SEQS), "--num-gpu-blocks-override", str(NUM_BLOCKS),
    ]  # fmt: skip
    server = VllmServer(small_model, flags, {}, folder / "server.log")
    try:
        server.wait_until_ready(900)
        yield server
    finally:
        server.stop()


def metric(server: VllmServer, name: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def nothing_is_held(server: VllmServer) -> bool:
    status = server.status()
    worker = status["workers"][0]
    return bool(
        status["arena"]["num_holds"] == status["num_releases_waiting"] == 0
        and worker["num_admitted"] == worker["num_running"] == worker["pool_num_held"] == 0
    )


def prompt(number: int) -> str:
    return f"Question {number}. {LONG}"


def stream(server: VllmServer, number: int, num_tokens: int, stop_after: int | None = None) -> list[int]:
    """The tokens of one stream on one of eight documents. ``stop_after``: the client hangs up after so many events."""
    body = {
        "model": BASE, "prompt": prompt(number), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True, "regrad": {"document_ids": [f"doc-{number % 8}"], "gamma": 1.5},
    }  # fmt: skip
    tokens: list[int] = []
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for count, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
            for choice in json.loads(line[6:])["choices"]:
                tokens += choice["token_ids"] or []
            if count == stop_after:
                break
    return tokens


@pytest.mark.timeout(900)
def test_those_who_stay_get_the_tokens_of_one_alone_while_others_hang_up_and_are_preempted(small: VllmServer) -> None:
    stays = [number for number in range(32) if number % 3]
    alone = {number: stream(small, number, 40) for number in stays}
    before = metric(small, "vllm:num_preemptions_total")
    with ThreadPoolExecutor(32) as pool:
        asked = {n: pool.submit(stream, small, n, 40, None if n in alone else 3) for n in range(32)}
        together = {number: asked[number].result() for number in stays}
    assert metric(small, "vllm:num_preemptions_total") > before, "with so few blocks somebody must wait"
    assert together == alone
    assert eventually(lambda: nothing_is_held(small))
    assert small.status()["workers"][0]["num_lost"] == 0


@pytest.mark.timeout(900)
def test_a_full_pool_refuses_some_and_the_batch_goes_on(small: VllmServer) -> None:
    """Each of twelve requests needs eight documents of its own, and the pool has room for five of them."""
    body = {"model": BASE, "prompt": "Tell me.", "max_tokens": 200, "temperature": 0, "ignore_eos": True}

    def ask(number: int) -> tuple[int, Any]:
        regrad = {"document_ids": [f"doc-{8 * number + place}" for place in range(8)]}
        answer = small.post("/v1/completions", {**body, "regrad": regrad})
        return answer.status_code, answer.json()

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [answer for status, answer in answers if status == 503]
    assert {status for status, _ in answers} == {200, 503}
    assert all("raise --regrad-worker-bytes" in answer["error"]["message"] for answer in refused)
    assert eventually(lambda: nothing_is_held(small))
    assert [ask(number)[0] for number in range(12)] == [200] * 12, "one after the other there is room"


@pytest.mark.timeout(900)
def test_many_requests_share_sixteen_documents_each(small: VllmServer) -> None:
    ids = [f"doc-{number}" for number in range(30)]

    def ask(number: int) -> list[int]:
        chosen = [ids[(number * 7 + place * 3) % 30] for place in range(10)]
        more = [id for id in ids if id not in chosen][:6]
        answer = small.complete("The sea", {"document_ids": [*dict.fromkeys(chosen), *more][:16], "gamma": 0.3})
        assert len(answer["regrad"]["documents"]) == 16
        return list(answer["choices"][0]["token_ids"])

    alone = [ask(number) for number in range(0, 64, 8)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert together[::8] == alone
    assert eventually(lambda: nothing_is_held(small))


@pytest.mark.timeout(900)
def test_an_update_reaches_new_requests_while_the_old_version_runs(small: VllmServer, bank: BankThread) -> None:
    regrad = {"document_ids": ["moving"], "gamma": 1.5}
    for _ in range(20):  # a fast machine may answer before the update comes
        bank.ingest([("moving", "The market is on Mondays.")])
        old = small.complete("When?", regrad, max_tokens=490)
        whole = old["choices"][0]["token_ids"]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(small.complete, "When?", regrad, max_tokens=490)
            assert eventually(lambda: running.done() or small.status()["workers"][0]["num_running"] == 1)  # noqa: B023
            bank.ingest([("moving", "The market is on Fridays now.")])
            came_in_time = not running.done()
            new = small.complete("When?", regrad, max_tokens=8)
            assert running.result()["choices"][0]["token_ids"] == whole
        if came_in_time:
            break
    assert came_in_time, "the update must come while it runs"
    assert new["regrad"]["documents"][0]["version"] == old["regrad"]["documents"][0]["version"] + 1
    assert new["choices"][0]["token_ids"] != whole[:8]
    bank.delete("moving")
    assert eventually(lambda: nothing_is_held(small))


@pytest.mark.timeout(900)
def test_beam_search_uses_the_documents(small: VllmServer) -> None:
    regrad = {"document_ids": ["doc-5"], "gamma": 1.5}
    greedy = small.complete("The harbour", regrad)["choices"][0]["token_ids"]
    one_beam = small.complete("The harbour", regrad, use_beam_search=True, n=1)["choices"][0]
    beams = small.complete("The harbour", regrad, use_beam_search=True, n=3)["choices"]
    plain = small.complete("The harbour", use_beam_search=True, n=3)["choices"]
    assert len(beams) == 3 and [beam["text"] for beam in beams] != [beam["text"] for beam in plain]
    assert one_beam["text"] == small.complete("The harbour", regrad)["choices"][0]["text"], greedy
    assert eventually(lambda: nothing_is_held(small))
