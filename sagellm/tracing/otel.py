"""Sends traces as OpenTelemetry spans over OTLP/HTTP. Needs the extra `otel`."""

import time
from importlib.metadata import version
from urllib.parse import urlsplit

import opentelemetry.trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sagellm.tracing.spans import Parent, Span, Trace

_TRACES_PATH = "/v1/traces"
_SEND_S = 5  # timeout of one batch


class OtelExporter:
    """Converts traces to OpenTelemetry spans, which `processor` queues and sends."""

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create(
            {"service.name": "sagellm", "service.version": version("sagellm")}
        )
        self._provider = TracerProvider(
            # `Tracer` has selected the requests already; `close` shuts the provider down.
            sampler=ALWAYS_ON,
            resource=resource,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sagellm")

    def send(self, trace: Trace) -> None:
        """Queue the spans of a trace. Converts its monotonic times to wall clock times."""
        offset_ns = time.time_ns() - round(trace.now_s * 1e9)
        above = _context(trace.parent) if trace.parent else Context()
        here = self._start(trace.root, above, SpanKind.SERVER, offset_ns)
        inside = set_span_in_context(here, above)
        for child in trace.children:
            self._start(child, inside, SpanKind.INTERNAL, offset_ns).end(_ns(child, offset_ns))
        here.end(_ns(trace.root, offset_ns))

    def close(self) -> None:
        self._provider.force_flush(_SEND_S * 1000)
        self._provider.shutdown()

    def _start(
        self, span: Span, above: Context, kind: SpanKind, offset_ns: int
    ) -> opentelemetry.trace.Span:
        begun = self._tracer.start_span(
            span.name,
            above,
            kind,
            span.attributes,
            start_time=round(span.begun_s * 1e9) + offset_ns,
        )
        for name, at_s in span.events:
            begun.add_event(name, timestamp=round(at_s * 1e9) + offset_ns)
        if span.error:
            begun.set_attribute("error.type", span.error)
            begun.set_status(Status(StatusCode.ERROR))
        return begun


def _ns(span: Span, offset_ns: int) -> int:
    return round(span.ended_s * 1e9) + offset_ns


def _context(parent: Parent) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED)
    above = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(above), Context())


def open_exporter(endpoint: str) -> OtelExporter:
    """Create the exporter for a collector's URL; the path `/v1/traces` may be left out."""
    bare = urlsplit(endpoint).path in ("", "/")
    url = endpoint.rstrip("/") + _TRACES_PATH if bare else endpoint
    return OtelExporter(BatchSpanProcessor(OTLPSpanExporter(url, timeout=_SEND_S)))
