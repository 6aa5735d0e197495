"""Rate limits and quotas of keys: over HTTP with a key for each limit, and what a counter remembers."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from core.auth import Caller
from core.catalogue import Catalogue
from core.job_store import Store
from core.plans import Plan
from core.problems import Problem
from core.quotas import Quotas
from core.requests import GenerationRequest
from core.settings import Jobs, Quota, QuotaSettings, Settings
from tests.conftest import ADMIN, Server, serving, wait_for

DRAW = {"prompt": "red apple", "num_inference_steps": 1}
LIMITS = {
    "minute": {"requests_per_minute": 2},
    "day": {"pictures_per_day": 3},
    "crowd": {"concurrent": 1},
    "size": {"pixel_steps": 64 * 64 * 4},
}


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = {hashed(key): limits for key, limits in LIMITS.items()}
    overrides = {"quotas": {"requests_per_minute": 1, "keys": keys}, "unidiffuser": {"warm_up": []}}
    with serving(tmp_path_factory.mktemp("quotas"), overrides, "service:StableDiffusion", env={"API_KEY": ",".join([*LIMITS, "plain"])}) as server:
        yield server


@pytest.mark.http
def test_requests_beyond_a_minutes_are_told_when_to_come_again(limited: Server) -> None:
    assert limited.post("/post_config", key=ADMIN, params=DRAW).status_code == 200  # the model is loaded
    wait_for(lambda: time.time() % 60 < 45, 20)  # the library weighs two windows; across their boundary a third may pass
    first, second, third = (limited.post("/post_config", key="minute", params=DRAW) for _ in range(3))
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["RateLimit-Policy"] == '"requests";q=2;w=60'
    assert first.headers["RateLimit"].startswith('"requests";r=1;t=')
    assert third.json()["type"] == "urn:easel:problem:rate-limit"
    assert 1 <= int(third.headers["Retry-After"]) <= 60
    assert third.headers["RateLimit"].startswith('"requests";r=0;t=')
    assert limited.get("/capabilities", key="minute").status_code == 200  # reading is free
    assert limited.post("/post_config", key="plain", params=DRAW).status_code == 200  # a key of its own count
    assert limited.post("/post_config", key="plain", params=DRAW).status_code == 429
    assert [limited.post("/post_config", key=ADMIN, params=DRAW).status_code for _ in range(2)] == [200, 200]


@pytest.mark.http
def test_pictures_beyond_the_days_are_refused_and_failures_cost_none(limited: Server) -> None:
    def asked(count: int, **more: object) -> int:
        return limited.post("/post_config", key="day", params={**DRAW, "count_returned": count, **more}).status_code

    assert asked(2) == 200
    assert asked(1, scheduler="nonsense") == 422
    refused = limited.post("/post_config", key="day", params={**DRAW, "count_returned": 2})
    assert refused.status_code == 429
    assert "1 are left, and 2 were asked for" in refused.json()["detail"]
    assert 0 < int(refused.headers["Retry-After"]) <= 86400
    assert asked(1) == 200
    assert asked(1) == 429


@pytest.mark.http
def test_a_key_has_one_generation_at_once_where_its_limit_says_so(limited: Server) -> None:
    slow = threading.Thread(target=limited.post, args=("/post_config", "crowd"), kwargs={"params": {"prompt": "star", "num_inference_steps": 100}})
    slow.start()
    wait_for(lambda: limited.get("/buffer_status", key=ADMIN).json()["queue"]["running"] == 1, 30)
    refused = limited.post("/post_config", key="crowd", params=DRAW)
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:easel:problem:concurrency-limit")
    slow.join()
    assert limited.post("/post_config", key="crowd", params=DRAW).status_code == 200


@pytest.mark.http
def test_a_request_larger_than_the_key_may_ask_for_names_the_field(limited: Server) -> None:
    assert limited.post("/post_config", key="size", params={**DRAW, "num_inference_steps": 4}).status_code == 200
    refused = limited.post("/post_config", key="size", params={**DRAW, "num_inference_steps": 4, "count_returned": 2})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "num_inference_steps"
    assert str(64 * 64 * 4) in refused.json()["errors"][0]["allowed"]


def plan(client: str) -> Plan:
    return Catalogue(Settings()).plan(GenerationRequest(prompt="x", count_returned=2), None, client)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(Jobs(store=f"sqlite:///{tmp_path}/jobs.sqlite3"))
    yield store
    store.close()


def test_what_the_usage_log_has_counts(store: Store) -> None:
    async def scenario() -> None:
        made = [2]
        quotas = Quotas(QuotaSettings(pictures_per_day=5), set(), lambda: store, lambda client: sum(made))
        async with quotas.place(plan("me")):
            made.append(2)
        with pytest.raises(Problem, match="1 are left, and 2 were asked for"):
            async with quotas.place(plan("me")):
                pass

    asyncio.run(scenario())


def test_pictures_in_the_making_are_spoken_for(store: Store) -> None:
    async def scenario() -> None:
        quotas = Quotas(QuotaSettings(pictures_per_day=3), set(), lambda: store, lambda _: 0)
        async with quotas.place(plan("me")):
            with pytest.raises(Problem, match="1 are left"):
                async with quotas.place(plan("me")):
                    pass
        with pytest.raises(RuntimeError):
            async with quotas.place(plan("other")):
                raise RuntimeError("failed")
        async with quotas.place(plan("other")):
            pass

    asyncio.run(scenario())


def test_of_requests_at_the_same_time_as_many_pass_as_may(store: Store) -> None:
    async def scenario() -> int:
        quotas = Quotas(QuotaSettings(concurrent=3), set(), lambda: store, lambda _: 0)
        passed, done = [], asyncio.Event()

        async def one() -> None:
            async with quotas.place(plan("me")):
                passed.append(1)
                await done.wait()

        requests = [asyncio.create_task(one()) for _ in range(8)]
        while sum(request.done() for request in requests) < 5:
            await asyncio.sleep(0.01)
        done.set()
        await asyncio.gather(*requests, return_exceptions=True)
        return len(passed)

    assert asyncio.run(scenario()) == 3
    assert store.take("me", 1)[1:] == (1, 1)  # all have given theirs back


def test_the_places_of_a_process_that_died_are_free_again(tmp_path: Path) -> None:
    dead, alive = (Store(Jobs(store=f"sqlite:///{tmp_path}/jobs.sqlite3")) for _ in range(2))
    dead.take("me", 4)
    assert alive.take("me", 1)[1:] == (2, 5)
    dead.settings = Jobs(lease_s=0.01)
    dead.beat([])  # its last sign of life
    time.sleep(0.1)
    assert alive.take("me", 1)[1:] == (2, 2)
    alive.sweep()
    for each in (dead, alive):
        each.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        assert connection.execute("SELECT count(*) FROM places").fetchone() == (2,)
    connection.close()


def test_a_store_that_is_gone_lets_requests_pass(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: object, **__: object) -> bool:
        raise ConnectionError("gone")

    async def scenario() -> None:
        async with quotas.place(plan("me")):
            pass

    quotas = Quotas(QuotaSettings(requests_per_minute=1, concurrent=1), set(), lambda: store, lambda _: 0)
    monkeypatch.setattr(quotas._requests, "hit", broken)
    assert asyncio.run(quotas.request(Caller("me", "user"))) == {}
    monkeypatch.setattr(store, "_engine", create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    asyncio.run(scenario())
    assert "does not answer; the request passes" in caplog.text


def test_admins_have_only_limits_of_their_own() -> None:
    quotas = Quotas(QuotaSettings(concurrent=1, keys={"0123456789ab": Quota(concurrent=2)}), {"0123456789ab", "ba9876543210"}, lambda: pytest.fail("not asked"), lambda _: 0)
    assert [quotas.of(client).concurrent for client in ("user", "0123456789ab", "ba9876543210")] == [1, 2, None]
