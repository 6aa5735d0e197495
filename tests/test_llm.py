"""Prompt assistance: what goes to the upstream and what does not, and that no fault of it is ours. The
routes over HTTP, then the client's bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from pydantic import ValidationError

from core.llm import Answer, Assistant
from core.problems import Problem
from core.settings import Llm, Secrets
from tests.conftest import USER, Server, serving
from tests.llm import KEY, FakeLlm
from tests.test_http import problem


@pytest.fixture
def fake() -> Iterator[FakeLlm]:
    with FakeLlm() as running:
        yield running


def assistant(fake: FakeLlm, **changes: Any) -> Assistant:
    settings = {"url": fake.url, "model": "tiny", **changes}
    return Assistant(Llm.model_validate(settings), Secrets(llm_api_key=KEY))


def ask(asked: Assistant, text: str = "red apple") -> Answer:
    return asyncio.run(asked.ask("llm_prompt_assistance", text))


def refusal(asked: Assistant) -> Problem:
    with pytest.raises(Problem) as raised:
        ask(asked)
    assert KEY not in raised.value.body().decode()
    return raised.value


@pytest.mark.http
def test_the_two_routes_ask_the_configured_upstream(tmp_path: Path, fake: FakeLlm) -> None:
    llm = {"url": fake.url, "model": "tiny", "system_prompt": "Improve it.", "max_tokens": 99, "text_characters": 100}
    with serving(tmp_path, {"llm": llm}, "service:UniDiffuser", env={"LLM_API_KEY": KEY}) as server:
        answer = server.get("/llm_prompt_assistance", params={"text": "red apple & more"})
        assert (answer.status_code, answer.text) == (200, "answered: red apple & more")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        asked = fake.seen[-1]
        assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
        assert asked.body == {
            "model": "tiny", "max_tokens": 99,
            "messages": [{"role": "system", "content": "Improve it."}, {"role": "user", "content": "red apple & more"}],
        }  # fmt: skip
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert "x-api-key" not in asked.headers
        assert not [value for value in asked.headers.values() if USER in value]

        assert server.get("/llm_interface", params={"text": "why?"}).text == "answered: why?"
        assert fake.seen[-1].body["messages"] == [{"role": "user", "content": "why?"}]

        headers = {"X-API-Key": USER, "Accept": "application/json"}
        fake.finish_reason = "length"
        whole = requests.get(server.url + "/llm_interface", params={"text": "why?"}, headers=headers, timeout=10)
        assert whole.json() == {"text": "answered: why?", "model": "tiny-1", "truncated": True}
        assert "cut" in whole.headers["x-easel-notes"]

        problem(requests.get(server.url + "/llm_interface?text=x", timeout=10), 401)
        for params in ({}, {"text": " "}, {"text": "x" * 101}, {"text": "a\0b"}, {"text": "x", "txt": "y"}):
            assert problem(server.get("/llm_interface", params=params), 422)["errors"][0]["field"] in ("text", "txt")
        before = len(fake.seen)
        fake.fault = "redirect-away"
        assert "redirect" in problem(server.get("/llm_interface", params={"text": "x"}), 502)["detail"]
        assert {seen.host for seen in fake.seen[before:]} == {"127.0.0.1"}


@pytest.mark.http
def test_without_an_upstream_the_routes_say_so(server: Server) -> None:
    for route in ("/llm_prompt_assistance", "/llm_interface"):
        assert problem(server.get(route, params={"text": "x"}), 503)["type"].endswith(":llm-off")


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        (("application/json", b'"a vivid red apple"'), ('"a vivid red apple"', "application/json")),
        (("application/json; charset=utf-8", b'{"prompt": "x"}'), ('{"prompt": "x"}', "application/json")),
        (("text/plain; charset=latin-1", "Äpfel".encode("latin-1")), ("Äpfel", "text/plain")),
        (("text/html", b"<b>x</b>"), ("<b>x</b>", "text/plain")),
        (("text/plain; charset=nonsense", b"x"), ("x", "text/plain")),
    ],
)
def test_a_legacy_answer_is_passed_on_as_it_came(fake: FakeLlm, sent: tuple[str, bytes], passed: tuple[str, str]) -> None:
    fake.legacy = sent
    answer = ask(assistant(fake, kind="legacy", model=None), "red & blue")
    assert (answer.text, answer.passed) == passed
    asked = fake.seen[-1]
    assert (asked.method, asked.path, asked.query) == ("GET", "/v1/llm_prompt_assistance", {"text": ["red & blue"]})


def test_a_redirect_on_the_host_is_followed_and_one_off_it_is_not(fake: FakeLlm) -> None:
    fake.fault = "redirect"
    assert ask(assistant(fake)).text == "answered: red apple"
    assert fake.seen[-1].path == "/v1/chat/completions/moved"
    fake.fault = "redirect-away"
    assert refusal(assistant(fake)).details.status == 502
    assert {seen.host for seen in fake.seen} == {"127.0.0.1"}
    fake.fault = "loop"
    before = len(fake.seen)
    assert "redirects" in refusal(assistant(fake)).details.detail
    assert len(fake.seen) - before == 4


@pytest.mark.parametrize("fault", ["hang", "endless"])
def test_a_slow_upstream_is_given_up(fake: FakeLlm, fault: str) -> None:
    fake.fault = fault
    found = refusal(assistant(fake, timeout_s=0.6))
    assert (found.details.status, found.details.type.rpartition(":")[2]) == (504, "llm-timeout")


@pytest.mark.parametrize(("fault", "why"), [("huge", "more than 100000 bytes"), ("html", "no chat completion"), ("no-choices", "no chat completion")])
def test_an_answer_that_is_none_is_a_bad_gateway(fake: FakeLlm, fault: str, why: str) -> None:
    fake.fault = fault
    found = refusal(assistant(fake, answer_bytes=100_000)).details
    assert (found.status, why in found.detail) == (502, True)


@pytest.mark.parametrize(("status", "ours"), [(400, 502), (401, 502), (404, 502), (429, 503), (500, 503), (302, 502)])
def test_an_upstreams_error_is_told_without_its_words(fake: FakeLlm, caplog: pytest.LogCaptureFixture, status: int, ours: int) -> None:
    fake.fault, fake.said = status, f"wrong key {KEY}".encode()
    asked = assistant(fake)
    found = refusal(asked)
    assert found.details.status == ours
    assert "wrong" not in caplog.text  # it might be the prompt
    assert f"answered {status}" in caplog.text
    refusal(Assistant(asked.settings, Secrets(llm_api_key=KEY), log_words=True))
    assert KEY not in caplog.text
    assert "wrong key KEY" in caplog.text
    if status == 429:
        assert found.headers["Retry-After"] == "8"


def test_an_upstream_that_is_not_there_is_unavailable() -> None:
    with FakeLlm() as gone:
        pass
    assert refusal(assistant(gone)).details.type.endswith(":llm-unreachable")


def test_no_more_are_asked_at_once_than_configured(fake: FakeLlm) -> None:
    async def two() -> list[Answer | BaseException]:
        asked = assistant(fake, concurrent_requests=1, timeout_s=10)
        return await asyncio.gather(*(asked.ask("llm_interface", "x") for _ in range(2)), asked.ask("llm_interface", "x"), return_exceptions=True)

    first, *others = asyncio.run(two())
    assert isinstance(first, Answer)
    assert [other.details.status for other in others if isinstance(other, Problem)] == [429, 429]
    assert len(fake.seen) == 1
    assert ask(assistant(fake, concurrent_requests=1)).text


@pytest.mark.parametrize("settings", [{"url": "ftp://x", "model": "m"}, {"url": "http://u:p@x/v1", "model": "m"}, {"url": "https://x/v1?k=1", "model": "m"}, {"url": "http://x/v1"}, {"url": "nothing", "model": "m"}])
def test_an_upstream_that_cannot_be_asked_is_refused_at_start(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"llm\."):
        Llm.model_validate(settings)
