"""OpenTelemetry for bank and clients. Without OTEL_EXPORTER_OTLP_ENDPOINT nothing is recorded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace

TRACER = "regrad"
ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_PROTOCOL"  # "grpc" (default) or "http/protobuf"
# Attributes by OpenTelemetry's conventions for generative AI. Others start with regrad.
OPERATION = "gen_ai.operation.name"
RETRIEVAL = "retrieval"  # the operation
DATA_SOURCE = "gen_ai.data_source.id"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_ID = "gen_ai.request.id"  # as in vLLM's own spans

Attribute = str | bool | int | float
_UNRECORDED = nullcontext(trace.INVALID_SPAN)


def configure_tracing(service_name: str) -> Callable[[], None]:
    """Exports this process's spans by OTLP if the endpoint is set. ``main`` calls it once.

    Returns a function that flushes and stops the export. It keeps a tracer provider that the process already has; vLLM
    may set one. ValueError for an unknown protocol, RuntimeError if the exporter is not installed.
    """
    if not os.environ.get(ENDPOINT_VARIABLE) or not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return lambda: None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter_class(os.environ.get(PROTOCOL_VARIABLE, "grpc"))()  # reads the standard variables
    except ImportError as error:
        raise RuntimeError(
            f"the OTLP exporter must be installed where {ENDPOINT_VARIABLE} is set; "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def span(
    name: str, parent: otel_context.Context | None = None, /, **attributes: Attribute
) -> AbstractContextManager[trace.Span]:
    """A span around the block, child of ``parent`` or of the current span. An exception or a cancellation marks it as
    failed.

    If nothing is recorded, which is usual, it costs almost nothing. The caller's trace context is still passed on.
    """
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return _recorded(name, parent, attributes)
    caller = trace.INVALID_SPAN if parent is None else trace.get_current_span(parent)
    return trace.use_span(caller) if caller.get_span_context().is_valid else _UNRECORDED


def inject(metadata: Iterable[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Adds the current trace context to a call's metadata, in W3C form."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return [*metadata, *carrier.items()]


def extract(metadata: Iterable[tuple[str, str | bytes]] | None) -> otel_context.Context:
    """Reads the caller's trace context from a call's metadata. It is empty if the caller sent none."""
    return propagate.extract({key: value for key, value in metadata or () if isinstance(value, str)})


@contextmanager
def _recorded(
    name: str, parent: otel_context.Context | None, attributes: Mapping[str, Attribute]
) -> Iterator[trace.Span]:
    with trace.get_tracer(TRACER).start_as_current_span(name, context=parent, attributes=attributes) as current:
        try:
            yield current
        except asyncio.CancelledError:  # OpenTelemetry does not count it as a failure
            current.set_status(trace.StatusCode.ERROR, "CANCELLED")
            raise


def _exporter_class(protocol: str) -> type:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter
    raise ValueError(f"{PROTOCOL_VARIABLE} must be grpc or http/protobuf, got {protocol!r}")
