from __future__ import annotations

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai

from tests.serve.collector import Collector
from tests.serve.support import BASE, VllmServer

OURS = {"regrad.prepare", "regrad.retrieve", "regrad.fetch", "regrad.load"}


def test_one_request_is_one_trace_from_the_client_through_server_and_worker(
    server: VllmServer, collector: Collector
) -> None:
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {
        "model": BASE,
        "prompt": "x",
        "max_tokens": 2,
        "regrad": {"document_ids": ["doc-140", "doc-141", "doc-142"]},
    }
    answer = server.post("/v1/completions", body, traceparent=f"00-{trace_id}-{parent}-01")
    assert answer.status_code == 200, answer.text
    spans = collector.wait_for(trace_id, lambda found: {span.name for span in found} >= OURS)
    by_name = {span.name: span for span in spans}
    assert set(by_name) >= OURS
    assert by_name["regrad.prepare"].parent_id == parent
    assert by_name["regrad.retrieve"].parent_id == by_name["regrad.prepare"].span_id
    assert by_name["regrad.fetch"].parent_id == by_name["regrad.prepare"].span_id
    assert {by_name[name].service for name in ("regrad.prepare", "regrad.fetch")} == {"regrad-server"}
    assert by_name["regrad.load"].service == "regrad-worker"
    assert by_name["regrad.prepare"].attributes == {
        gen_ai.GEN_AI_REQUEST_MODEL: BASE, "gen_ai.request.id": answer.json()["regrad"]["request_id"],
    }  # fmt: skip
    assert by_name["regrad.retrieve"].attributes == {
        gen_ai.GEN_AI_OPERATION_NAME: gen_ai.GenAiOperationNameValues.RETRIEVAL.value,
        gen_ai.GEN_AI_DATA_SOURCE_ID: "default",
    }
    assert by_name["regrad.load"].attributes == {"regrad.num_documents": 3}
