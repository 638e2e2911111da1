"""An OTLP collector: a real gRPC server that keeps the spans it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True)
class Span:
    service: str
    name: str
    trace_id: str  # 32 hex digits
    span_id: str  # 16 hex digits
    parent_id: str
    attributes: dict[str, str | int]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """``address`` is what OTEL_EXPORTER_OTLP_ENDPOINT must be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                        values = {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}
                        self._spans.append(Span(names.get("service.name", ""), span.name, *ids, values))
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, trace_id: str, complete: Callable[[list[Span]], bool], seconds: float = 30) -> list[Span]:
        """The trace's spans, once ``complete`` says so or the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                found = [span for span in self._spans if span.trace_id == trace_id]
            if complete(found) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def stop(self) -> None:
        self._server.stop(1).wait()
