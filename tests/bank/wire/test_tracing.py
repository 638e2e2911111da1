"""Spans of a real bank process, exported by OTLP to a collector in the test."""

from __future__ import annotations

import asyncio
import signal
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

from bank_service.testing.client import Client
from bank_service.wire.generated import bank_pb2 as pb
from bank_service.wire.tracing import ENDPOINT_VARIABLE, configure_tracing, extract, inject, span
from tests.bank.bank_process import address_of, start_bank

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Collector(otlp_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, str]] = []  # name, trace id, span id, parent id

    def Export(  # noqa: N802 - the service's name
        self, request: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for item in scope.spans:
                    ids = (item.trace_id.hex(), item.span_id.hex(), item.parent_span_id.hex())
                    self.spans.append((item.name, *ids))
        return otlp.ExportTraceServiceResponse()


@pytest.mark.asyncio
async def test_a_calls_spans_go_from_server_to_bank_to_store_under_the_callers_trace(data_dir: Path) -> None:
    collector = Collector()
    receiver = grpc.server(futures.ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    process = start_bank(data_dir, **{ENDPOINT_VARIABLE: f"http://127.0.0.1:{port}"})
    try:
        address = await address_of(process, data_dir)
        async with Client(address.target) as client:
            parent = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
            await client.put("a", "text")
            await client.stub.Query(pb.QueryRequest(text="text", top_k=1, include_gradients=True), metadata=parent)
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
        await asyncio.to_thread(receiver.stop(None).wait)
    parents = {name: (trace_id, parent_id) for name, trace_id, _, parent_id in collector.spans}
    names = {span_id: name for name, _, span_id, _ in collector.spans}
    assert parents["bank.Query"] == (TRACE_ID, PARENT_ID)
    for child, above in (
        ("bank.embed", "bank.Query"),
        ("catalog.read", "bank.Query"),
        ("exact.search", "catalog.read"),
        ("cache.get", "bank.Query"),
    ):
        (spans,) = [
            [item for item in collector.spans if item[0] == child and item[1] == TRACE_ID],
        ]
        assert len(spans) == 1 and names[spans[0][3]] == above, child
    for child, above in (("catalog.put", "bank.store"), ("blobs.put", "bank.store")):
        assert names[parents[child][1]] == above
        assert parents[child][0] != TRACE_ID


def test_without_an_endpoint_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT_VARIABLE, raising=False)
    configure_tracing("test")()
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    with span("anything", number=1) as current:
        assert not current.is_recording()


def test_the_context_goes_through_metadata() -> None:
    context = extract((("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("binary-bin", b"\0")))
    with span("child", context):
        sent = dict(inject([("mine", "kept")]))
    assert sent["mine"] == "kept" and sent["traceparent"].startswith(f"00-{TRACE_ID}-")
    assert inject() == [] and not trace.get_current_span(extract(None)).get_span_context().is_valid
