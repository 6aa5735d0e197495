"""Webhooks: what a receiver gets, that it can check it, and where none is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from pydantic import SecretStr
from standardwebhooks import Webhook, WebhookVerificationError

from api.webhooks import Webhooks
from core.problems import Problem
from core.settings import WebhookSettings
from tests.conftest import Server, serving, wait_for
from tests.test_http import problem
from tests.test_jobs import DRAW, SETTINGS, SLOW, over, running

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Receiver:
    """An HTTP server on loopback that keeps what it is sent, and answers the first request with 503."""

    def __init__(self) -> None:
        self.got: list[dict] = []
        self.tries: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                verified = Webhook(SECRET).verify(body, dict(self.headers))
                with pytest.raises(WebhookVerificationError):
                    Webhook(SECRET).verify(body + b" ", dict(self.headers))
                receiver.tries.append(self.headers["webhook-id"])
                self.send_response(503 if len(receiver.tries) == 1 else 204)
                self.end_headers()
                if len(receiver.tries) > 1:
                    receiver.got.append(verified)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, job: dict) -> list[str]:
        return [event["type"] for event in self.got if event["data"]["id"] == job["id"]]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"webhooks": {"allowed_schemes": ["http"], "allowed_hosts": ["127.0.0.1", "localhost"], "allow_private_hosts": ["127.0.0.1"], "retry_wait_s": 0.1}}
    with serving(tmp_path_factory.mktemp("webhooks"), SETTINGS | settings, "service:StableDiffusion", env={"WEBHOOK_SECRET": SECRET}) as running:
        yield running


@pytest.mark.http
def test_start_output_and_end_are_told_signed_and_tried_again(server: Server, receiver: Receiver) -> None:
    job = server.post("/jobs", params={**DRAW, "webhook_url": receiver.url}).json()
    wait_for(lambda: receiver.of(job) == ["job.start", "job.output", "job.completed"], 60, server)
    assert receiver.tries == [f"{job['id']}.{event}" for event in ("start", "start", "output", "completed")]
    last = receiver.got[-1]["data"]
    assert last == server.get(job["urls"]["self"]).json() | {"queue_position": None}
    assert last["outputs"][0]["media_type"] == "image/png"


@pytest.mark.http
def test_a_cancelled_job_is_told_too_and_refused_addresses_at_once(server: Server, receiver: Receiver) -> None:
    job = server.post("/jobs", params={**SLOW, "webhook_url": receiver.url}).json()
    running(server, job)
    requests.delete(server.url + job["urls"]["cancel"], headers={"X-API-Key": "your-api-key"}, timeout=60)
    assert over(server, job)["status"] == "canceled"
    wait_for(lambda: receiver.of(job) == ["job.start", "job.completed"], 30, server)
    for url in ("https://127.0.0.1/", "http://example.com/", "http://u:p@127.0.0.1/", "nonsense", "http://"):
        assert problem(server.post("/jobs", params={**DRAW, "webhook_url": url}), 422)["errors"][0]["field"] == "webhook_url"
    # A name whose address is private is found out when it is called.
    hidden = server.post("/jobs", params={**DRAW, "webhook_url": receiver.url.replace("127.0.0.1", "localhost")}).json()
    assert over(server, hidden)["status"] == "succeeded"
    wait_for(lambda: "private, loopback or link-local" in server.log.read_text(), 30, server)
    assert receiver.of(hidden) == []


def test_without_a_secret_none_may_be_named() -> None:
    with pytest.raises(Problem, match="WEBHOOK_SECRET"):
        Webhooks(WebhookSettings(), SecretStr("")).check("https://example.com/")
    Webhooks(WebhookSettings(), SecretStr("x")).check("https://example.com/")
