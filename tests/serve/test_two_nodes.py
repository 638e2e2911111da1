"""Two servers behind the documented router and two bank nodes on one PostgreSQL, of which one is killed."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.object_servers import moto
from regrad_vllm.client import Bank, Document
from regrad_vllm.local.pair import wait_for_bank
from regrad_vllm.local.processes import Service, Services
from tests.bank.postgres_server import started
from tests.house.nginx import routing
from tests.serve.support import API_KEY, BASE, VllmServer, random_learner
from tests.serve.test_upgrade import saved, server, text_of

pytestmark = [pytest.mark.only_test_all, pytest.mark.timeout(1200)]

NUM_DOCUMENTS = 40
NUM_ASKERS = 4


@pytest.fixture
def nodes(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, Service, str]]:
    """The processes of both nodes, and the address of both."""
    learner = saved(random_learner(small_model, 1), tmp_path / "learner")
    with ExitStack() as stack:
        postgres = started()
        stack.callback(postgres.remove)
        store = stack.enter_context(moto())
        urllib.request.urlopen(urllib.request.Request(f"{store.endpoint}/bucket", method="PUT"), timeout=30).close()
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        services = stack.enter_context(Services(tmp_path))
        shared = ["--catalog", postgres.new_schema(), "--objects", "s3://bucket/prefix", "--port", "0"]
        given = ["--model", str(small_model), "--learner", str(learner), *shared]
        first, second = (
            services.start(name, ["bank", "--data-dir", str(tmp_path / name), *given]) for name in ("node-1", "node-2")
        )
        yield first, second, f"ipv4:{wait_for_bank(first)},{wait_for_bank(second)}"


def resident(server: VllmServer) -> set[str]:
    return {record["gradient_digest"] for record in server.client.get("/v1/regrad/resident").json()["records"]}


def test_answers_go_on_with_the_right_documents_when_a_node_is_killed(
    small_model: Path, tmp_path: Path, nodes: tuple[Service, Service, str]
) -> None:
    victim, _, both = nodes
    with ExitStack() as stack:
        bank = stack.enter_context(Bank(both))
        receipts = bank.ingest(Document(f"d{n}", text_of(n, 0)) for n in range(NUM_DOCUMENTS))
        digests = [receipt.gradient_digest for receipt in receipts]
        servers = [
            stack.enter_context(server(small_model, tmp_path / "learner", both, tmp_path / name))
            for name in ("server-1", "server-2")
        ]
        url = stack.enter_context(routing(tmp_path, servers[0].port, servers[1].port))
        headers = {"authorization": f"Bearer {API_KEY}"}
        client = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False))
        pool = stack.enter_context(ThreadPoolExecutor(NUM_ASKERS))

        def used(number: int) -> str:
            """The gradient in an answer about a document, which is also the request's route."""
            id = f"d{number}"
            body = {"model": BASE, "prompt": "Who?", "max_tokens": 4, "regrad": {"document_ids": [id]}}
            said = client.post("/v1/completions", json=body, headers={"x-regrad-route": id})
            assert said.status_code == 200, said.text
            (document,) = said.json()["regrad"]["documents"]
            return str(document["gradient_digest"])

        half = range(NUM_DOCUMENTS // 2)
        assert list(pool.map(used, half)) == [digests[n] for n in half]
        both_halves = [n for _ in range(4) for n in range(NUM_DOCUMENTS)]
        asking = [pool.submit(used, n) for n in both_halves]
        while sum(each.done() for each in asking) < NUM_DOCUMENTS // 4:
            time.sleep(0.01)
        victim.process.kill()
        assert sum(each.done() for each in asking) < NUM_DOCUMENTS, "else the node had nothing left to do"
        assert [each.result() for each in asking] == [digests[n] for n in both_halves]
        (changed,) = bank.ingest([Document("d0", text_of(0, 1))])
        assert used(0) == changed.gradient_digest != digests[0]
        at = [resident(each) for each in servers]
        assert all(at) and set(digests[1:]) < at[0] | at[1] and not at[0] & at[1]
