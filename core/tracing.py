"""OpenTelemetry spans: off, unless OTEL_EXPORTER_OTLP_ENDPOINT says where they go.

BentoML makes the span of each HTTP request and carries the trace from the entry to its runners; this adds the stages
within, and takes the query strings, which may hold prompts, out of all of them. BentoML's own `tracing` configuration is
not used, since its exporters would send them. service.py calls `configure`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context
from bentoml._internal.utils.telemetry import ParentBasedTraceIdRatio  # type: ignore[attr-defined]
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer
from opentelemetry.util.http import ExcludeList

from core import logs
from core.generation import Timing

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROBES = ["/livez", "/healthz", "/readyz", "/metrics", "/internal/status"]
_QUERIED = ("http.target", "http.url", "url.full")  # attributes that have a query string at their end


def configure() -> None:
    """Have this process's spans go where the environment says.

    Raises:
        ValueError: where the package that sends them is not installed.
    """
    if _endpoint() and find_spec("opentelemetry.exporter.otlp.proto.http") is None:
        raise ValueError("OTEL_EXPORTER_OTLP_ENDPOINT needs a package: pip install 'opentelemetry-exporter-otlp-proto-http==1.45.1'")
    BentoMLContainer.tracer_provider.set(_Later())
    BentoMLContainer.tracing_excluded_urls.set(ExcludeList(_PROBES))


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """What is done here is a span."""
    with _tracer().start_as_current_span(name):
        yield


def stages(timing: Timing, submitted_ns: int) -> None:
    """Spans for the stages of a plan that is done, one after the other since it was submitted (of `time.time_ns`). Each is the
    stage's time in all, where a plan took more than one batch."""
    at = submitted_ns
    for name, ms in (("queue", timing.queue), ("load", timing.load), ("denoise", timing.denoise), ("decode", timing.decode), ("safety", timing.safety)):
        if ms:
            made, at = _tracer().start_span(name, start_time=at), at + round(ms * 1e6)
            made.end(at)


def _endpoint() -> bool:
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    return not off and any(os.environ.get(name) for name in _ENDPOINTS)


class _Later(trace.TracerProvider):
    """Makes the provider on first use: before, this process does not know its service."""

    def get_tracer(self, *args: Any, **named: Any) -> Tracer:
        return _provider().get_tracer(*args, **named)


@lru_cache(maxsize=1)
def _provider() -> TracerProvider:
    if not _endpoint():
        return TracerProvider(sampler=ParentBasedTraceIdRatio(0.0))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    names = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "easel"), "easel.service": server_context.service_name or "none"}
    # BentoML needs spans that record, also of requests that are not sampled; OpenTelemetry's own samplers make others.
    sampler = ParentBasedTraceIdRatio(float(os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1")))
    provider = TracerProvider(sampler=sampler, resource=Resource.create(names))
    provider.add_span_processor(_Sent(OTLPSpanExporter()))
    return provider


def _tracer() -> Tracer:
    return _provider().get_tracer("easel")


class _Sent(BatchSpanProcessor):
    """Sends spans with their job's id, without query strings, and without those of single ASGI messages."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if job := logs.job_id.get():
            span.set_attribute(logs.JOB, job)

    def on_end(self, span: ReadableSpan) -> None:
        if span.name.endswith((" http send", " http receive")):
            return
        told = {name: value.partition("?")[0] if isinstance(value, str) and name in _QUERIED else value for name, value in (span.attributes or {}).items() if name != "url.query"}
        super().on_end(
            ReadableSpan(
                span.name, span.context, span.parent, span.resource, told, span.events, span.links, span.kind,
                status=span.status, start_time=span.start_time, end_time=span.end_time, instrumentation_scope=span.instrumentation_scope,
            )
        )  # fmt: skip
