"""Traces of a real server, received over OTLP: one through the entry and the runner, its stages within, and no prompt in it."""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from core.settings import ROOT
from tests.conftest import Server, serving, wait_for
from tests.test_http import picture, problem
from tests.test_jobs import over

pytestmark = pytest.mark.http
SECRET = "xanadu"
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


@dataclass
class Collector:
    """What an OTLP/HTTP receiver on loopback was sent."""

    url: str
    bodies: list[bytes] = field(default_factory=list)

    def spans(self, trace: str) -> dict[tuple[str, str], Span]:
        """A trace's spans by service and name."""
        return {key: span for key, span in self.every() if span.trace_id.hex() == trace}

    def every(self) -> Iterator[tuple[tuple[str, str], Span]]:
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "easel.service")
                yield from (((service, span.name), span) for scope in resource.scope_spans for span in scope.spans)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collected = Collector("")

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collected.bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        collected.url = f"http://127.0.0.1:{listener.server_port}"
        yield collected
        listener.shutdown()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with serving(tmp_path_factory.mktemp("tracing"), {}, env=env) as running:
        yield running


def traced(trace: str) -> dict[str, str]:
    """The headers of a caller who traces."""
    return {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}


def test_a_trace_goes_through_entry_and_runner(server: Server, collector: Collector) -> None:
    assert picture(server.post("/post_config", params={"prompt": f"red apple, {SECRET}", "num_inference_steps": 4}, headers=traced(CALLER)))
    entry, runner = "ImageGeneration", "StableDiffusion"
    expected = {(entry, "POST /post_config"), (entry, "encode"), (runner, "POST /internal/run"), *((runner, stage) for stage in ("queue", "load", "denoise", "decode"))}
    wait_for(lambda: expected <= collector.spans(CALLER).keys(), 20)
    spans = collector.spans(CALLER)
    assert spans.keys() == expected  # no probes, no single messages
    request, call = spans[entry, "POST /post_config"], spans[runner, "POST /internal/run"]
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    assert call.parent_span_id == spans[entry, "encode"].parent_span_id == request.span_id
    stages = [spans[runner, stage] for stage in ("queue", "load", "denoise", "decode")]
    assert {stage.parent_span_id for stage in stages} == {call.span_id}
    for stage, following in itertools.pairwise(stages):
        assert call.start_time_unix_nano <= stage.start_time_unix_nano <= stage.end_time_unix_nano == following.start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= call.end_time_unix_nano <= request.end_time_unix_nano


def test_the_work_on_a_job_is_a_trace_with_its_id(server: Server, collector: Collector) -> None:
    answer = server.post("/jobs", params={"prompt": f"red apple, {SECRET}", "num_inference_steps": 4}, headers=traced("5" * 32))
    assert over(server, answer.json())["status"] == "succeeded"
    mine = {"easel.job_id": answer.json()["id"]}

    def found() -> dict[tuple[str, str], Span]:
        spans = {key: span for key, span in collector.every() if mine.items() <= {a.key: a.value.string_value for a in span.attributes}.items()}
        return {key: span for key, span in spans.items() if not key[1].startswith("GET ")}

    entry, runner = "ImageGeneration", "StableDiffusion"
    expected = {(entry, "POST /jobs"), (entry, "job"), (runner, "POST /internal/run"), *((runner, stage) for stage in ("queue", "denoise", "decode"))}
    wait_for(lambda: expected <= found().keys(), 20)
    work = found()[entry, "job"]
    assert not work.parent_span_id
    assert found()[entry, "POST /jobs"].trace_id.hex() == "5" * 32
    assert {found()[runner, stage].trace_id for stage in ("POST /internal/run", "denoise")} == {work.trace_id}


def test_no_query_and_no_prompt_is_sent(server: Server, collector: Collector) -> None:
    problem(server.post("/post_config", params={"prompt": SECRET, "width": 7}, headers=traced("1" * 32)), 422)
    problem(server.get("/llm_interface", params={"text": SECRET}), 503)
    assert server.post("/txt2img", json={"prompt": SECRET, "num_inference_steps": 1}, headers=traced("2" * 32)).ok
    wait_for(lambda: bool(collector.spans("1" * 32)) and ("StableDiffusion", "denoise") in collector.spans("2" * 32), 20)
    assert any(b"/post_config" in body for body in collector.bodies)
    assert not any(SECRET.encode() in body for body in collector.bodies)


def test_log_lines_name_the_trace(server: Server) -> None:
    assert server.post("/post_config", params={"prompt": "x", "num_inference_steps": 1}, headers=traced("3" * 32)).ok
    wait_for(lambda: server.log.read_text().count(f"trace_id={'3' * 32}") >= 2, 10)


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['opentelemetry.exporter.otlp.proto.http'] = None; import service"
    env = {"API_KEY": "k", "PATH": "/usr/bin:/bin", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'opentelemetry-exporter-otlp-proto-http" in done.stderr
