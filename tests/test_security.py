"""Attacks that no other test tries; SECURITY.md has them all, each with the test that makes it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import os
import re
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import httpx
import psutil
import pytest
from bentoml._internal.context import server_context
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message

from api import answering, gate
from core import auth, images
from core.auth import Keys
from core.draining import Draining
from core.generation import AppliedEmbedding, AppliedLora
from core.loras import Lora, Registry
from core.problems import Problem
from core.quotas import Quotas
from core.settings import ROOT, Limits, Secrets, Settings
from tests.conftest import Server
from tests.test_document import DOCUMENT
from tests.test_usage import drawn

SECRETS = Secrets(api_key="user-key,second-key", admin_api_key="admin-key")
BASIC = {"Authorization": "Basic " + base64.b64encode(b"me:user-key").decode()}
A1111 = "/sdapi/v1/samplers"


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_context, "service_type", "entry_service")


def door(app: ASGIApp, mode: str = "keys") -> gate.Gate:
    settings, http = Settings(auth={"mode": mode}), FastAPI()
    http.state.routes = []
    return gate.Gate(app, settings=settings, keys=Keys(settings, SECRETS), quotas=Quotas(settings.quotas, set(), lambda: pytest.fail("not asked"), lambda _: 0), http=http, draining=Draining(1, 0))


def asked(path: str, headers: dict[str, str], method: str = "GET", mode: str = "keys", at: str = "http://127.0.0.1:3000") -> httpx.Response:
    """The gate's answer; behind it, all that passes is a 200."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door(JSONResponse({}), mode)), base_url=at) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


# 1. Browsers.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:3000"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),  # typed into the address bar
        ({"Sec-Fetch-Site": "cross-site"}, 401),
        ({"Sec-Fetch-Site": "same-site"}, 401),
        ({"Origin": "http://evil.example"}, 401),  # over plain HTTP browsers send no Sec-Fetch-Site
        ({"Origin": "null"}, 401),
        ({"Origin": "http://127.0.0.1:3000"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_password_that_a_browser_keeps_does_not_work_for_pages_of_other_sites(headers: dict[str, str], status: int, method: str) -> None:
    assert asked(A1111, BASIC | headers, method).status_code == status


@pytest.mark.parametrize("headers", [[], [(b"x-api-key", b"admin-key")]])
def test_a_websocket_is_closed_before_anything_behind_the_door_sees_it(headers: list[tuple[bytes, bytes]]) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def behind(*_: object) -> None:
        pytest.fail("it was let in")

    scope = {"type": "websocket", "path": "/jobs", "headers": headers, "query_string": b"", "server": ("127.0.0.1", 3000)}
    asyncio.run(door(behind)(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_key_that_a_page_sends_itself_works_from_anywhere() -> None:
    assert asked(A1111, {"X-API-Key": "user-key", "Sec-Fetch-Site": "cross-site", "Origin": "http://a.example"}).status_code == 200


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1:3000", 200), ("localhost:3000", 200), ("localhost", 200), ("[::1]:3000", 200), ("evil.example:3000", 403), ("127.0.0.1.evil.example", 403), ("10.0.0.5", 403), ("", 403)])
def test_a_name_that_was_made_to_lead_here_does_not_open_a_server_without_keys(host: str, status: int) -> None:
    assert asked("/capabilities", {"Host": host}, mode="off").status_code == status


def test_a_server_without_keys_asks_the_socket_and_no_header_who_is_near() -> None:
    near = {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1", "Host": "localhost", "X-Forwarded-Host": "localhost"}
    assert asked("/capabilities", near, mode="off", at="http://10.0.0.5:3000").status_code == 403


def test_no_other_site_is_told_that_it_may_read() -> None:
    for method in ("GET", "OPTIONS"):
        answer = asked("/capabilities", {"X-API-Key": "user-key", "Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, method)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert answer.headers["x-content-type-options"] == "nosniff"


@given(st.text(max_size=20) | st.text("\r\n:Xé ", max_size=20))
def test_nothing_that_is_named_ends_a_header(named: str) -> None:
    names = dict.fromkeys(("model_id", "scheduler", "schedule", "device", "prompt", "negative_prompt", "licence", "worker", "degraded", "experiment", "variant"), named)
    lists = {
        "credit": [named], "notes": [named],
        "loras": [AppliedLora(name=named, weight=1, sha256="f", layers=1, unmatched=0, commercial_use=True, credit=named)],
        "embeddings": [AppliedEmbedding(name=named, sha256="f", vectors=1, commercial_use=True, credit=named)],
    }  # fmt: skip
    ran = drawn().ran.model_copy(update={**names, **lists})
    assert all(re.fullmatch("[ -~]*", value) for value in answering.describe(ran, [1]).values())


# 2. Keys.


@pytest.mark.parametrize("given", ["user-key", "second-key", "admin-key", "wrong", "", "u" * 10_000])
def test_every_key_is_compared_whatever_is_given(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, real = [], hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return real(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", counted)
    Keys(Settings(), SECRETS).caller({"x-api-key": given})
    assert sorted(compared) == [b"admin-key", b"second-key", b"user-key"]


HEALTH = {"/livez", "/healthz", "/readyz"}
CHANGES_ALL = {"/add_lora", "/remove_lora", "/add_new_lora"}  # beside what is under /admin/


@pytest.mark.parametrize("path", sorted(DOCUMENT["paths"].keys() - HEALTH))
def test_every_route_needs_a_key_and_those_that_act_for_all_an_admins(path: str) -> None:
    for method in DOCUMENT["paths"][path]:
        for_admins = path.startswith("/admin/") or path in CHANGES_ALL
        statuses = [asked(re.sub(r"\{\w+\}", "x", path), headers, method).status_code for headers in ({}, {"X-API-Key": "user-key"}, {"X-API-Key": "admin-key"})]
        assert [status if status in (401, 403) else "let in" for status in statuses] == [401, 403 if for_admins else "let in", "let in"]


def test_secrets_and_refusals_do_not_show_a_key() -> None:
    assert "user-key" not in f"{SECRETS!r}{SECRETS}{SECRETS.model_dump()}{SECRETS.model_dump_json()}"
    answer = asked("/capabilities", {"X-API-Key": "wr0ng-key", "Authorization": "Bearer wr0ng-token"})
    assert answer.status_code == 401
    assert "wr0ng" not in answer.text + str(answer.headers)


# 3. Files.


def test_texts_and_profiles_that_unpack_to_more_than_memory_are_refused_or_left() -> None:
    packed = zlib.compress(bytes(300 * 1024 * 1024), 9)
    whole = io.BytesIO()
    images.Image.new("RGB", (8, 8)).save(whole, "PNG")
    header, rest = whole.getvalue()[:33], whole.getvalue()[33:]
    for kind, body in ((b"zTXt", b"parameters\0\0" + packed), (b"iTXt", b"parameters\0\1\0\0\0" + packed), (b"iCCP", b"icc\0\0" + packed)):
        chunk = len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)
        before = psutil.Process().memory_info().rss
        try:
            described = images.describe(header + chunk + rest, Limits())
        except Problem as problem:
            assert problem.details.status == 422
        else:
            assert sum(map(len, described.texts.values())) < 2**21
        assert psutil.Process().memory_info().rss - before < 128 * 1024 * 1024


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/../b.safetensors", "x.safetensors/../../y", "..\\x.safetensors", "x.pt", "x.safetensors\0", ".hidden.safetensors"])
def test_a_registry_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bare name|null|pattern"):
        Lora(name="x", base_model="b", lora_path="p", file_name=name)
    assert Registry(tmp_path / "r.json", tmp_path / "loras").entries() == {}


# 4. The sockets between the server's processes, which take pickles and commands.


@pytest.mark.http
def test_only_its_own_user_reaches_the_sockets_between_processes(server: Server) -> None:
    first = psutil.Process(server.process.pid)
    processes = [first, *first.children(recursive=True)]
    port = httpx.URL(server.url).port
    assert {c.laddr.port for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN} == {port}
    assert not [c for p in processes for c in p.net_connections("udp")]
    paths = {c.laddr for p in processes for c in p.net_connections("unix") if c.laddr}
    private = {path for path in paths if re.search(r"bentoml-uds-|easel-control-", path)}
    assert len(private) >= 4  # two runners, and the supervisor's commands and events
    assert paths == private
    for path in private:
        folder = Path(path).parent.stat()
        assert (stat.S_IMODE(folder.st_mode), folder.st_uid) == (0o700, os.getuid())
    if os.getuid() == 0:
        code = "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        for path in private:
            done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
            assert "PermissionError" in done.stderr


# 5. The table.


def test_each_test_that_the_table_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 60
    missing = [f"{file}.{name}" for file, name in named if not re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / f"{file}.py").read_text() if (ROOT / "tests" / f"{file}.py").is_file() else "", re.MULTILINE)]
    assert missing == []
