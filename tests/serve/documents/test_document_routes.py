"""Documents over HTTP: stored, read, listed, searched and deleted; what is refused names its field."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI

from bank_service.wire.errors import from_rpc_error
from regrad_vllm.local.processes import free_port
from regrad_vllm.serve.api.endpoint import RegradEndpoint
from regrad_vllm.serve.documents.errors import of_bank
from regrad_vllm.serve.seams import server_seams
from regrad_vllm.serve.settings import Settings, SettingsError
from tests.house.pages import examples
from tests.serve.documents.conftest import serving

HARBOUR = {"text": "The harbour master of Orlen is Ada.", "title": "Orlen", "metadata": {"language": "en"}}
JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    return error


def test_a_document_is_stored_read_found_and_deleted(routes: httpx.Client, namespace: str) -> None:
    here = {"namespace": namespace}
    path = "/documents/ports%2Forlen"
    created = routes.put(path, params=here, json=HARBOUR).json()
    assert (created["id"], created["status"], created["version"]) == ("ports/orlen", "created", 1)
    assert routes.put(path, params=here, json=HARBOUR).json() == {**created, "status": "unchanged"}
    stored = routes.get(path, params=here).json()
    assert {name: stored[name] for name in HARBOUR} == HARBOUR
    assert stored["gradient_digest"] == created["gradient_digest"] and stored["namespace"] == namespace
    updated = routes.put(path, params=here, json={"text": "It is Otto."}).json()
    assert (updated["status"], updated["version"]) == ("updated", 2)
    deleted = routes.delete(path, params=here).json()
    assert deleted["deleted"] is True and deleted["version"] == 2 and deleted["sequence"] > updated["sequence"]
    assert error_of(routes.get(path, params=here), 404)["param"] == "id"


def test_a_version_that_was_not_read_is_not_replaced(routes: httpx.Client, namespace: str) -> None:
    def put(text: str, version: int) -> httpx.Response:
        asked = {"namespace": namespace, "expected_version": version}
        return routes.put("/documents/lamp", params=asked, json={"text": text})

    assert put("It is red.", 0).json()["version"] == 1
    assert "version" in error_of(put("It is green.", 0), 409)["message"]
    assert put("It is blue.", 1).json()["version"] == 2
    error_of(put("It is green.", 1), 409)
    assert routes.get("/documents/lamp", params={"namespace": namespace}).json()["text"] == "It is blue."
    routes.delete("/documents/lamp", params={"namespace": namespace})
    assert put("It is back.", 0).json()["version"] == 3


def test_a_listing_comes_in_pages(routes: httpx.Client, namespace: str) -> None:
    ids = ["a", "b/1", "b/2", "b/3", "c", "é"]
    for id in ids:
        routes.put(f"/documents/{id}", params={"namespace": namespace}, json={"text": f"text of {id}"})
    found: list[str] = []
    after = ""
    for _ in range(3):
        page = routes.get("/documents", params={"namespace": namespace, "limit": 2, "after": after}).json()
        found += [document["id"] for document in page["data"]]
        after = page["last_id"]
        assert page["has_more"] is (len(found) < len(ids)) and after == found[-1]
    assert found == ids
    page = routes.get("/documents", params={"namespace": namespace, "prefix": "b/", "after": "b/1"}).json()
    assert [document["id"] for document in page["data"]] == ["b/2", "b/3"] and not page["has_more"]
    page = routes.get("/documents", params={"namespace": namespace, "prefix": "x"}).json()
    assert page["data"] == [] and page["last_id"] is None


def test_a_query_finds_documents_with_their_weights(routes: httpx.Client, namespace: str) -> None:
    here = {"namespace": namespace}
    routes.put("/documents/harbour", params=here, json=HARBOUR)
    sequence = routes.put("/documents/lamp", params=here, json={"text": "The lamp is red."}).json()["sequence"]
    answer = routes.post("/query", params=here, json={"query": "the harbour master", "top_k": 2, "with_cue": 1}).json()
    best, other = answer["data"]
    assert (best["id"], best["title"], best["text"]) == ("harbour", "Orlen", HARBOUR["text"])
    assert best["weight"] == 1 > other["weight"] > 0 and best["cosine"] > other["cosine"]
    assert [hit["cue"][0]["text"] for hit in answer["data"] if hit["cue"]] == [HARBOUR["text"]]
    assert answer["sequence"] == sequence
    english = [{"key": "language", "operator": "equals", "values": ["en"]}]
    answer = routes.post("/query", params=here, json={"query": "lamp", "filter": english, "with_text": False}).json()
    assert [(hit["id"], hit["text"]) for hit in answer["data"]] == [("harbour", None)]
    named = routes.post("/query", params=here, json={"document_ids": ["lamp"]}).json()
    assert [(hit["id"], hit["weight"]) for hit in named["data"]] == [("lamp", 1.0)]


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("PUT", "/documents/x", {}, "text"), ("PUT", "/documents/x", {"text": ""}, "text"),
        ("PUT", "/documents/x", {"text": " "}, "text"), ("PUT", "/documents/x", {"text": "a\0"}, "text"),
        ("PUT", "/documents/x", {"text": "x" * (2**20 + 1)}, "text"),
        ("PUT", "/documents/x", {"text": "x" * (2**20 - 1) + "é"}, "text"),
        ("PUT", "/documents/x", {"text": "x", "title": "y" * 1025}, "title"),
        ("PUT", "/documents/x", {"text": "x", "metadata": {str(n): "" for n in range(33)}}, "metadata"),
        ("PUT", "/documents/x", {"text": "x", "metadata": {"a": 1}}, "metadata.a"),
        ("PUT", "/documents/x", {"text": "x", "attributes": {}}, "attributes"),
        ("PUT", "/documents/" + "x" * 257, {"text": "x"}, "id"), ("GET", "/documents/", None, "id"),
        ("GET", "/documents?limit=0", None, "limit"), ("GET", "/documents?limit=1001", None, "limit"),
        ("POST", "/query", {}, "query"), ("POST", "/query", {"query": "x", "document_ids": ["y"]}, "query"),
        ("POST", "/query", {"query": "x", "topk": 1}, "topk"), ("POST", "/query", {"query": "x", "top_k": 17}, "top_k"),
        ("POST", "/query", {"query": "x", "top_k": True}, "top_k"),
        ("POST", "/query", {"document_ids": ["y"], "top_k": 1}, "top_k"),
        ("POST", "/query", {"query": "x", "as_of": 10**9}, "as_of"),
        ("POST", "/query", {"query": "x" * (2**20 + 1)}, "query"),
        ("POST", "/query", {"query": "x", "filter": [{"key": "a", "operator": "like"}]}, "filter[0].operator"),
        ("POST", "/query", {"query": "x", "filter": [{"key": "a", "operator": "equals"}]}, "filter[0].values"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_a_400_that_names_its_field(
    routes: httpx.Client, method: str, path: str, body: dict[str, Any] | None, param: str
) -> None:
    error = error_of(routes.request(method, path, json=body), 400)
    assert error["param"] == param and error["message"].startswith(param), error


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_namespace_with_another_character_is_refused(routes: httpx.Client, method: str) -> None:
    body = HARBOUR if method == "PUT" else None
    answer = routes.request(method, "/documents/x", params={"namespace": "a b"}, json=body)
    assert error_of(answer, 400)["param"] == "namespace"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"query":', 400), (b"[" * 100_000, 400), (b"[1]", 400), (b'{"query": "x", "min_score": NaN}', 400),
        (b'{"query": "\\ud800"}', 400), (b"", 400), (b"x" * (8 * 2**20 + 1), 413),
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(routes: httpx.Client, content: bytes, status: int) -> None:
    error_of(routes.post("/query", content=content, headers=JSON), status)


def test_what_is_not_there_is_a_404(routes: httpx.Client, namespace: str) -> None:
    here = {"namespace": namespace}
    assert error_of(routes.post("/query", params=here, json={"query": "x"}), 404)["param"] == "namespace"
    routes.put("/documents/harbour", params=here, json=HARBOUR)
    assert error_of(routes.delete("/documents/other", params=here), 404)["param"] == "id"
    named = routes.post("/query", params=here, json={"document_ids": ["other"]})
    assert error_of(named, 404)["param"] == "document_ids"


def test_a_deletion_that_expects_another_version_is_a_409(routes: httpx.Client, namespace: str) -> None:
    here = {"namespace": namespace}
    routes.put("/documents/harbour", params=here, json=HARBOUR)
    error_of(routes.delete("/documents/harbour", params={**here, "expected_version": 2}), 409)
    assert routes.delete("/documents/harbour", params={**here, "expected_version": 1, "purge": True}).is_success


@pytest.fixture(scope="module")
def reading(bank_address: str) -> Iterator[httpx.Client]:
    with serving(bank_address, documents="read", namespace="team-a") as client:
        yield client


def test_a_server_that_only_reads_refuses_every_change(reading: httpx.Client, routes: httpx.Client) -> None:
    assert Settings(learner=Path("/nowhere")).documents == "read", "the default"
    routes.put("/documents/harbour", params={"namespace": "team-a"}, json=HARBOUR)
    assert reading.get("/documents/harbour").json()["namespace"] == "team-a", "the server's own namespace"
    for answer in (
        reading.put("/documents/harbour", json=HARBOUR), reading.delete("/documents/harbour"),
        reading.post("/documents/batch", content=b'{"id": "a", "text": "b"}'),
    ):  # fmt: skip
        assert "--regrad-documents write" in error_of(answer, 403)["message"]
    assert reading.post("/query", json={"query": "x"}).is_success


@pytest.mark.parametrize("origin", ["https://example.com", "null", "http://localhost:1"])
def test_a_page_of_another_site_changes_and_reads_nothing(routes: httpx.Client, origin: str) -> None:
    for method, path in (
        ("PUT", "/documents/x"), ("DELETE", "/documents/x"), ("POST", "/documents/batch"), ("GET", "/documents"),
        ("GET", "/documents/x"), ("POST", "/query"),
    ):  # fmt: skip
        content = json.dumps({"id": "x", "text": "x"}).encode()
        answer = routes.request(method, path, content=content, headers={"origin": origin, "content-type": "text/plain"})
        assert error_of(answer, 403)["message"].startswith("Origin must be")


def test_the_servers_own_page_reads_and_changes_documents_and_a_name_that_leads_here_does_not(
    routes: httpx.Client, namespace: str
) -> None:
    own = f"{routes.base_url.host}:{routes.base_url.port}"
    for host, status in ((own, 200), ("localhost:8000", 200), ("rebound.example:8000", 403)):
        headers = {"host": host, "origin": f"http://{host}"}
        answer = routes.put("/documents/x", params={"namespace": namespace}, json=HARBOUR, headers=headers)
        assert answer.status_code == status, answer.text
        for given in (headers, {"host": host}):  # a page's own GET has no Origin
            read = routes.get("/documents/x", params={"namespace": namespace}, headers=given)
            assert read.status_code == status, read.text


@pytest.mark.parametrize(("documents", "has_routes"), [("off", False), ("read", True)])
def test_documents_that_are_off_have_no_routes(
    documents: str, has_routes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_LEARNER", "/nowhere")
    monkeypatch.setenv("REGRAD_DOCUMENTS", documents)
    for patch in ("install_served_call", "install_bounded_lora_metrics"):  # they would change vLLM for other tests
        monkeypatch.setattr(server_seams, patch, lambda: None)
    app = FastAPI()
    RegradEndpoint().attach_router(app)
    paths = {getattr(route, "path", "") for route in app.routes}
    assert {"/regrad", "/v1/regrad/status"} <= paths
    assert any(path.startswith(("/v1/regrad/documents", "/v1/regrad/query")) for path in paths) is has_routes


@pytest.mark.parametrize("root_path", ["/", "/v1/", "/x/", "/v1/regrad", "/v"])
def test_a_root_path_that_would_switch_the_api_key_off_is_refused(
    root_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_LEARNER", "/nowhere")
    with pytest.raises(SettingsError, match="--root-path must not"):
        RegradEndpoint().attach_router(FastAPI(root_path=root_path))


@pytest.mark.parametrize(
    ("code", "details", "words"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)", "at most 4194304 bytes"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "raw text", "takes no more calls now"),
        (grpc.StatusCode.UNKNOWN, "raw text", "broken off"),
    ],
)
def test_what_grpc_says_itself_is_put_into_our_words(code: grpc.StatusCode, details: str, words: str) -> None:
    none = grpc.aio.Metadata()
    error = of_bank(from_rpc_error(grpc.aio.AioRpcError(code, none, none, details)), "127.0.0.1:1")
    assert words in error.message and details not in error.message and code.name not in error.message


def test_a_bank_that_is_down_is_a_503_that_says_what_to_do() -> None:
    with serving(f"127.0.0.1:{free_port()}") as client:
        for answer in (
            client.get("/documents/x"), client.get("/documents"), client.put("/documents/x", json=HARBOUR),
            client.delete("/documents/x"), client.post("/query", json={"query": "x"}),
            client.post("/documents/batch", content=b'{"id": "a", "text": "b"}'),
        ):  # fmt: skip
            message = error_of(answer, 503)["message"]
            assert "start it with `regrad bank`" in message and "UNAVAILABLE" not in message
            assert answer.headers["retry-after"] == "1"


def test_the_pages_example_stores_lists_finds_and_deletes(routes: httpx.Client, tmp_path: Path) -> None:
    script = examples()["http"].code.replace("http://localhost:8000", str(routes.base_url).partition("/v1/")[0])
    run = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    put, *batch, listed, found, deleted = [json.loads(line) for line in run.stdout.splitlines() if line]
    assert put["status"] == "created" and put["namespace"] == "ports"
    stored, refused = sorted(batch, key=lambda told: int(told["line"]))
    assert stored["status"] == "created" and refused["error"]["param"] == "text"
    assert [document["id"] for document in listed["data"]] == ["harbour", "lamp"]
    assert found["data"][0]["id"] == "harbour" and deleted["deleted"] is True
