"""OpenTelemetry traces of HTTP calls; needs the extra `muxjax[otel]`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from muxjax._version import __version__
from muxjax.errors import MuxError


class TracingUnavailable(MuxError):
    """Tracing was requested, but OpenTelemetry is not installed."""


class Tracing:
    """Exports a span for every call: a child of the client's span if it sent `traceparent`.

    Args:
      exporter: an OpenTelemetry span exporter.
    """

    def __init__(self, exporter: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "muxjax", "service.version": __version__})
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("muxjax.serve")

    @classmethod
    def to_endpoint(cls, endpoint: str) -> Tracing:
        """Returns tracing that exports to an OTLP collector over HTTP (`http://localhost:4318/v1/traces`).

        Raises:
          TracingUnavailable: the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise TracingUnavailable(
                f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'muxjax[otel]'"
            ) from error
        return cls(OTLPSpanExporter(endpoint=endpoint))

    @contextlib.contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[dict[str, str | int | float]]:
        """Opens a span and yields a dict for its attributes, which is read when the span ends."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        attributes: dict[str, str | int | float] = {}
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        try:
            yield attributes
        finally:
            span.set_attributes(attributes)
            span.end()

    def close(self) -> None:
        """Exports the remaining spans and stops."""
        self._provider.shutdown()
