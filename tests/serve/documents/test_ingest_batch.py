"""A batch: NDJSON in, an answer for each line, while the body is still sent."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bank_service.service.server import BankServer
from bank_service.testing.hash_encoder import HashEncoder, spec_of
from bank_service.testing.tokens import Tokens
from bank_service.values.config import BankConfig
from regrad_vllm.client import AsyncBank
from regrad_vllm.serve.documents import document_routes, ingest_batch
from regrad_vllm.serve.documents.ingest_batch import MAX_LINE_BYTES, Batch, lines_of
from tests.client.conftest import bank_process
from tests.serve.documents.conftest import serving

NDJSON = {"content-type": "application/x-ndjson"}


def line(id: str, text: str = "A text.") -> bytes:
    return json.dumps({"id": id, "text": text}).encode() + b"\n"


def send(routes: httpx.Client, namespace: str, body: bytes | Iterator[bytes]) -> list[dict[str, Any]]:
    answer = routes.post("/documents/batch", params={"namespace": namespace}, content=body, headers=NDJSON)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson", answer.text
    return [json.loads(told) for told in answer.text.splitlines()]


def test_each_line_is_answered_and_a_bad_one_stops_no_other(routes: httpx.Client, namespace: str) -> None:
    body = [
        line("a"), b'{"id": "b"}\n', b"\n", line("c", "\0"), b"{broken\n", b"[1]\n", b'{"text": "x"}\n',
        line("d", "x" * MAX_LINE_BYTES), line("e", "x" * (2**20 - 1) + "é"), line("f").rstrip(),
    ]  # fmt: skip
    answers = {told["line"]: told for told in send(routes, namespace, b"".join(body))}
    stored = {number: told["id"] for number, told in answers.items() if "error" not in told}
    assert stored == {1: "a", 10: "f"} and answers[1]["status"] == "created" and answers[1]["version"] == 1
    refused = {number: (told["id"], told["error"]["param"]) for number, told in answers.items() if "error" in told}
    assert refused == {2: ("b", "text"), 4: ("c", "text"), 5: (None, None), 6: (None, None), 7: (None, "id"),
                       8: (None, None), 9: ("e", "text")}  # fmt: skip
    assert answers[8]["error"]["code"] == 413
    listed = routes.get("/documents", params={"namespace": namespace}).json()["data"]
    assert [document["id"] for document in listed] == ["a", "f"]


def test_documents_are_acknowledged_in_order_and_once_whatever_the_bank_refuses(
    routes: httpx.Client, namespace: str
) -> None:
    refused = {5, 6, 99, 299}
    body = (line(f"d{n:03}", "\0" if n in refused else f"text {n}") for n in range(300))
    answers = send(routes, namespace, body)
    assert [told["line"] for told in answers] == list(range(1, 301))
    assert {n for n, told in enumerate(answers) if "error" in told} == refused
    listed = routes.get("/documents", params={"namespace": namespace, "limit": 1000}).json()["data"]
    assert len(listed) == 296 and {document["version"] for document in listed} == {1}


def test_an_answer_comes_before_the_next_line_is_sent(routes: httpx.Client, namespace: str) -> None:
    connection = http.client.HTTPConnection(routes.base_url.host, routes.base_url.port, timeout=30)
    connection.putrequest("POST", f"/v1/regrad/documents/batch?namespace={namespace}")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    answer = None
    for number in range(1, 4):
        sent = line(f"d{number}")
        connection.send(b"%x\r\n%s\r\n" % (len(sent), sent))
        answer = answer or connection.getresponse()
        assert json.loads(answer.readline())["line"] == number
    connection.send(b"0\r\n\r\n")
    assert answer is not None and answer.read() == b""
    connection.close()


def test_a_client_may_send_all_before_it_reads(routes: httpx.Client, namespace: str) -> None:
    answers = send(routes, namespace, b'{"id": 1}\n' * 30_000)  # 5 MB of answers
    assert [told["line"] for told in answers] == list(range(1, 30_001))


@pytest.mark.parametrize("large", [{"title": "x" * 5_000_000}, {"metadata": {"a": "x" * 5_000_000}},
                                   {"text": "\U0001f600" * 2**20}])  # fmt: skip
def test_a_document_too_large_for_a_message_is_refused_alone(
    routes: httpx.Client, namespace: str, large: dict[str, object]
) -> None:
    big = json.dumps({"id": "big", "text": "x", **large}, ensure_ascii=False).encode() + b"\n"
    first, second, third = sorted(
        send(routes, namespace, line("a") + big + line("c")), key=lambda told: int(told["line"])
    )
    assert [first["id"], third["id"]] == ["a", "c"] and "error" not in first | third
    assert second["error"]["code"] == 400 and "RESOURCE_EXHAUSTED" not in second["error"]["message"]


def test_a_batch_ends_when_its_client_hangs_up_and_only_so_many_run(
    routes: httpx.Client, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_routes, "MAX_BATCHES", 1)
    connection = http.client.HTTPConnection(routes.base_url.host, routes.base_url.port, timeout=30)
    connection.putrequest("POST", f"/v1/regrad/documents/batch?namespace={namespace}")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    connection.send(b"%x\r\n%s\r\n" % (len(line("a")), line("a")))
    answer = connection.getresponse()
    assert json.loads(answer.readline())["id"] == "a"
    refused = routes.post("/documents/batch", content=line("b"))
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    answer.close()
    connection.close()
    deadline = time.monotonic() + 20
    while routes.post("/documents/batch", content=b"").status_code != 200:
        assert time.monotonic() < deadline, "the batch of a client that hung up must end"


def test_a_client_that_does_not_read_is_paused_and_gets_every_answer(
    bank_address: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_batch, "_ANSWERS_WAITING", 4)
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield line(f"d{number}") if number % 2 else b"no JSON\n"

    async def read() -> list[dict[str, Any]]:
        async with AsyncBank(bank_address, spec=spec_of(), timeout_ms=20_000) as bank:
            answers = Batch(bank, namespace, body()).answers()
            told = [await anext(answers)]
            before = -1
            while before < taken:  # until nothing more is taken for a while
                before = taken
                await asyncio.sleep(0.5)
            assert taken < 200
            told += [answer async for answer in answers]
        return [json.loads(answer) for answer in told]

    told = asyncio.run(read())
    assert sorted(answer["line"] for answer in told) == list(range(1, 201))
    assert sum("error" in answer for answer in told) == 100


def test_an_empty_batch_has_no_answers(routes: httpx.Client, namespace: str) -> None:
    assert send(routes, namespace, b"") == send(routes, namespace, b"\n \n") == []


def test_a_bank_that_goes_ends_the_batch_with_a_line_that_says_so(tmp_path: Path) -> None:
    with bank_process(tmp_path) as (process, address), serving(address) as client:

        def body() -> Iterator[bytes]:
            yield line("a")
            yield line("b")
            process.kill()
            process.wait()
            for n in range(100):
                yield line(f"c{n}")

        answer = client.post("/documents/batch", content=body(), headers=NDJSON)
        if answer.status_code == 503:  # killed before the first was stored
            told = answer.json()
        else:
            *_, told = map(json.loads, answer.text.splitlines())
            assert told["id"] is None and "send them again" in told["error"]["message"]
        assert told["error"]["code"] == 503


def test_the_rights_of_the_servers_token_are_the_routes(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    reader = tokens.add("reader", "read", "team-a")
    config = BankConfig(data_dir=tmp_path / "data", port=0, tokens_file=tokens.path)

    def ask(address: str, token: Path | None, namespace: str) -> list[int]:
        with serving(address, bank_token_file=token, namespace=namespace) as client:
            answers = [
                client.get("/documents"), client.post("/query", json={"query": "x"}), client.delete("/documents/a"),
                client.put("/documents/a", json={"text": "x"}), client.post("/documents/batch", content=line("a")),
            ]  # fmt: skip
        assert all(answer.is_success or answer.json()["error"]["code"] == answer.status_code for answer in answers)
        return [answer.status_code for answer in answers]

    async def run() -> None:
        async with BankServer(config, HashEncoder()) as bank:
            address = bank.address.target
            assert await asyncio.to_thread(ask, address, reader.token_file, "team-a") == [404, 404, 403, 403, 403]
            assert await asyncio.to_thread(ask, address, reader.token_file, "team-b") == [403] * 5
            assert await asyncio.to_thread(ask, address, None, "team-a") == [503] * 5

    asyncio.run(run())


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_are_the_same_however_the_body_is_cut(size: int) -> None:
    body = b"ab\n\n123456789\n  \nc\n12345678\nlast"
    cut = [body[start : start + size] for start in range(0, len(body), size)]

    async def read() -> list[tuple[int, bytes | None]]:
        return [found async for found in lines_of(pieces(*cut), 8)]

    assert asyncio.run(read()) == [(1, b"ab"), (3, None), (5, b"c"), (6, b"12345678"), (7, b"last")]
