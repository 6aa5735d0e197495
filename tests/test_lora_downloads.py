"""Downloads over broken lines, against a fake of Civitai: each fault is a clear problem that leaves
nothing behind and the registry as it was, and the next request works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from core.egress import is_public
from core.loras.installing import Installer, Job
from core.loras.messages import Added, AddLora
from core.outgoing import parse_retry_after
from core.problems import Problem
from core.settings import ROOT, Secrets, Settings
from tests.civitai import KEY, SIGNATURE, FakeCivitai, weights


@pytest.fixture
def fake() -> Iterator[FakeCivitai]:
    with FakeCivitai() as running:
        running.add(1, "Ghibli")
        running.add(2, "Other")
        yield running


def installer(fake: FakeCivitai, folder: Path, **changes: Any) -> Installer:
    settings = Settings(loras={**fake.settings(), **changes})
    return Installer(settings, Secrets(civit_key=KEY, hf_token="hub-secret"), folder)


def add(made: Installer, source: Any = 1, **more: Any) -> Added:
    async def run() -> Added:
        return await made.start(AddLora(source=source, **more)).result()

    return asyncio.run(run())


def refused(made: Installer, status: int, slug: str, source: Any = 1, **more: Any) -> str:
    """Add and see it refused: registry and folder stay as they were; return the text."""
    before = made.registry.path.read_bytes() if made.registry.path.exists() else None
    files = contents(made)
    with pytest.raises(Problem) as caught:
        add(made, source, **more)
    details = caught.value.details
    assert (details.status, details.type) == (status, f"urn:easel:problem:{slug}"), details
    assert (made.registry.path.read_bytes() if made.registry.path.exists() else None) == before
    assert contents(made) == files
    assert KEY not in details.model_dump_json()
    assert SIGNATURE not in details.model_dump_json()
    assert details.detail in [j.state.error.detail for j in made.jobs.values() if j.state.error]
    return details.detail


def contents(made: Installer) -> list[str]:
    folder = made.registry.folder
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_a_lora_is_downloaded_checked_and_registered(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    added = add(made)
    content = fake.contents[10]
    assert (added.name, added.already_there) == ("Ghibli", False)
    assert contents(made) == ["civitai-10.safetensors"]
    assert (made.registry.folder / "civitai-10.safetensors").read_bytes() == content
    entry = json.loads(made.registry.path.read_text())["Ghibli"]
    assert entry.pop("date_added").endswith("Z")
    assert entry == {
        "model_id": 1, "base_model": "stabilityai/stable-diffusion-xl-base-1.0", "lora_path": f"{fake.url}/api/download/models/10",
        "trigger words": ["Ghibli style", "extra"], "allow_no_mention": False, "usage_rights": "AllowCommercialUse", "family": "sdxl",
        "version_id": 10, "file_name": "civitai-10.safetensors", "sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
        "creator": "ann", "nsfw": False, "preview": "https://image.civitai.com/p.jpeg", "civitai_base_model": "SDXL 1.0", "allow_commercial_use": ["Image"], "schema_version": 2,
    }
    assert "?fileId=100" in next(s.path for s in fake.seen if "download" in s.path)
    state = next(iter(made.jobs.values())).state
    assert (state.status, state.progress.value, state.progress.bytes, state.progress.total_bytes) == ("succeeded", 1, len(content), len(content))
    assert sorted(os.listdir(tmp_path)) == ["lora_list.json", "loras"]


def test_what_is_there_is_not_downloaded_again(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    add(made)
    for source in (1, "ghibli", "Ghibli", f"{fake.url}/models/1/a-slug?modelVersionId=10", "1@10", f"{fake.url}/api/download/models/10"):
        assert add(made, source).already_there
    assert len(fake.downloads()) == 1


def test_weights_that_are_gone_are_fetched_again_and_hand_edits_stay(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    add(made)
    made.registry.change("Ghibli", trigger_words=["mine"], usage_rights="None")
    (made.registry.folder / "civitai-10.safetensors").unlink()
    added = add(made, "Ghibli")
    assert not added.already_there
    assert (added.lora["trigger words"], added.lora["usage_rights"]) == (["mine"], "None")
    assert contents(made) == ["civitai-10.safetensors"]


def test_an_entry_written_for_the_seed_gets_its_weights(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    entry = {"model_id": 1, "base_model": "stabilityai/stable-diffusion-xl-base-1.0", "lora_path": "https://civitai.com/api/download/models/10", "trigger words": [], "allow_no_mention": True, "usage_rights": "AllowCommercialUse"}
    made.registry.path.write_text(json.dumps({"old name": entry}))
    added = add(made, "old name")
    assert added.lora["file_name"] == "civitai-10.safetensors"
    assert made.registry.file(made.registry.find("old name")).is_file()
    assert list(made.registry.entries()) == ["old name"]


# Lines that break, and heal


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_broken_line_is_resumed_where_it_broke(fake: FakeCivitai, tmp_path: Path, fault: str) -> None:
    made = installer(fake, tmp_path)
    fake.faults.file, fake.faults.times = fault, 2
    add(made)
    ranges = [s.headers.get("Range") for s in fake.downloads()]
    assert ranges[0] is None
    assert 0 < int(ranges[1][6:-1]) < int(ranges[2][6:-1]) < len(fake.contents[10])
    assert (made.registry.folder / "civitai-10.safetensors").read_bytes() == fake.contents[10]


def test_more_cuts_than_attempts_are_survived_as_long_as_each_brings_something(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path, attempts=2)
    fake.faults.file, fake.faults.times = "cut", 6
    add(made)
    assert len(fake.downloads()) == 7


@pytest.mark.parametrize("fault", ["no-range", "changed"])
def test_a_host_that_cannot_resume_is_asked_from_the_beginning(fake: FakeCivitai, tmp_path: Path, fault: str) -> None:
    made = installer(fake, tmp_path)
    fake.faults.file, fake.faults.times = fault, 1
    add(made)
    assert (made.registry.folder / "civitai-10.safetensors").read_bytes() == fake.contents[10]
    assert len(fake.downloads()) == 2


def test_a_file_of_unannounced_length_is_taken(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.faults.file = "chunked"
    add(installer(fake, tmp_path))


@pytest.mark.parametrize("value", ["1", "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_a_busy_host_is_asked_again_after_the_time_it_names(fake: FakeCivitai, tmp_path: Path, value: str) -> None:
    fake.faults.download_status, fake.faults.times, fake.faults.download_headers = 429, 1, {"Retry-After": value}
    started = time.monotonic()
    add(installer(fake, tmp_path))
    assert time.monotonic() - started >= (1 if value == "1" else 0)


def test_the_api_s_brown_outs_are_survived(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.faults.api_status, fake.faults.times = 503, 2
    add(installer(fake, tmp_path))


# Faults that stay


def next_works(fake: FakeCivitai, made: Installer) -> None:
    fake.faults.__init__()
    before = contents(made)
    add(made, 2)
    assert contents(made) == sorted([*before, "civitai-20.safetensors"])


@pytest.mark.parametrize(
    ("fault", "status", "slug", "says"),
    [
        ({"file": "html"}, 502, "lora-source-answer", "web page"),
        ({"file": "json"}, 502, "lora-source-answer", "message instead of a file"),
        ({"file": "wrong"}, 502, "lora-wrong-hash", "SHA-256"),
        ({"file": "no-range"}, 502, "lora-source-cut", "broke off"),
        ({"file": "hang"}, 504, "lora-source-stalled", "sent nothing for 0.6 s"),
        ({"file": "huge"}, 413, "lora-too-large", "loras.max_bytes"),
        ({"file": "expired"}, 502, "lora-source-forbidden", "127.0.0.2 forbids it"),
        ({"download_status": 400}, 502, "lora-source-refused", "400"),
        ({"download_status": 401, "download_body": {"error": "Unauthorized", "message": "wants a login"}}, 502, "lora-source-unauthorized", "wants a login: check CIVIT_KEY"),
        ({"download_status": 403, "download_body": {"error": "Early Access", "deadline": "2026-12-01", "message": "early"}}, 502, "lora-source-forbidden", "Early Access, early, 2026-12-01"),
        ({"download_status": 404, "download_body": {"error": "not there"}}, 404, "lora-not-found", "not there"),
        ({"download_status": 410, "download_body": {"error": "Archived"}}, 410, "lora-archived", "Archived"),
        ({"download_status": 429, "download_headers": {"Retry-After": "3600"}}, 503, "lora-source-busy", "429"),
        ({"download_status": 500}, 503, "lora-source-busy", "500"),
        ({"api_status": 429}, 503, "lora-source-busy", "[key]"),
        ({"api_status": 503, "api_headers": {"Retry-After": "9"}}, 503, "lora-source-busy", "503"),
        ({"api_body": b"<html>"}, 502, "lora-source-answer", "text/html instead of JSON"),
        ({"api_body": b"[]"}, 502, "lora-source-answer", "no object"),
        ({"api_body": b'{"id": "x"}'}, 502, "lora-source-answer", "not as documented"),
    ],
    ids=str,
)
def test_a_fault_is_a_clear_problem(fake: FakeCivitai, tmp_path: Path, fault: dict[str, Any], status: int, slug: str, says: str) -> None:
    made = installer(fake, tmp_path)
    for name, value in fault.items():
        setattr(fake.faults, name, value)
    assert says in refused(made, status, slug)
    next_works(fake, made)


def test_a_file_that_does_not_say_how_long_it_is_is_still_bounded(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.add(3, "Long", content=weights(30) + bytes(200_000), file={"sizeKB": None, "hashes": {}})
    fake.faults.file = "chunked"
    assert "loras.max_bytes" in refused(installer(fake, tmp_path, max_bytes=100_000), 413, "lora-too-large", 3)


def test_a_wait_that_is_too_long_is_told_at_once(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.faults.download_status, fake.faults.download_headers = 429, {"Retry-After": "3600"}
    made = installer(fake, tmp_path)
    with pytest.raises(Problem) as caught:
        add(made)
    assert caught.value.headers["Retry-After"] == "3601"
    assert len([s for s in fake.seen if "download" in s.path]) == 1


@pytest.mark.parametrize(
    ("content", "slug", "says"),
    [
        (b"PK\x03\x04" + bytes(5000), "lora-not-safetensors", "pickle"),
        (b"<html>login</html>" * 50, "lora-not-safetensors", "web page"),
        (weights()[:-1000], "lora-not-safetensors", "no whole safetensors"),
        ((10**12).to_bytes(8, "little") + b"{}", "lora-not-safetensors", "no whole safetensors"),
        (weights(key="model.diffusion_model.weight"), "lora-not-a-lora", "model.diffusion_model.weight"),
        (weights(key="lokr_like.lokr_w1"), "lora-not-a-lora", "lokr"),
        (weights(key="lora_unet_mid_block_0.dora_scale"), "lora-not-a-lora", "dora_scale"),
        (b"", "lora-not-safetensors", "no whole safetensors"),
    ],
)
def test_a_file_that_is_no_lora_is_refused(fake: FakeCivitai, tmp_path: Path, content: bytes, slug: str, says: str) -> None:
    fake.add(3, "Bad", content=content)
    made = installer(fake, tmp_path)
    assert says in refused(made, 502, slug, 3)
    next_works(fake, made)


def test_a_full_disk_is_told_and_leaves_nothing(fake: FakeCivitai, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the kernel refuses to write on, as it does where it is full."""
    made = installer(fake, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        assert "no room" in refused(made, 507, "disk-full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    next_works(fake, made)


def test_a_registry_that_cannot_be_written_takes_no_weights(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    made.registry.path.write_text("{")
    assert "line 1" in refused(made, 409, "lora-registry-broken")
    made.registry.path.write_text("{}")
    next_works(fake, made)


def test_nobody_home_is_told(fake: FakeCivitai, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        made = installer(fake, tmp_path, civitai_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "cannot be reached" in refused(made, 503, "lora-source-unreachable")


def test_a_download_has_a_deadline(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.faults.file = "slow"
    made = installer(fake, tmp_path, deadline_s=0.5)
    assert "loras.deadline_s" in refused(made, 504, "lora-deadline")
    next_works(fake, made)


# Where it connects, and with what


@pytest.mark.parametrize(
    ("redirect", "says"),
    [
        ("http://169.254.169.254/latest/meta-data", "not among loras.allowed_hosts"),
        ("http://evil.example/x", "not among loras.allowed_hosts"),
        ("https://127.0.0.2/x", "not among loras.allowed_schemes"),
        ("file:///etc/passwd", "allowed_schemes"),
        ("http://user:pass@evil.example/", "not among loras.allowed_hosts"),
    ],
)
def test_a_redirect_to_elsewhere_is_refused(fake: FakeCivitai, tmp_path: Path, redirect: str, says: str) -> None:
    fake.faults.redirect = redirect
    made = installer(fake, tmp_path)
    with pytest.raises(Problem) as caught:
        add(made)
    assert caught.value.details.status == 502
    assert says in caught.value.details.detail or "cannot be followed" in caught.value.details.detail
    assert contents(made) == []
    next_works(fake, made)


@pytest.mark.parametrize("host", ["127.0.0.5", "localhost", "2130706433", "[::1]", "0.0.0.0"])
def test_a_listed_host_with_a_private_address_is_refused_after_name_resolution(fake: FakeCivitai, tmp_path: Path, host: str) -> None:
    fake.faults.redirect = f"http://{host}:{fake.files_url.split(':')[-1]}/files/10"
    made = installer(fake, tmp_path, allowed_hosts=["*"])
    assert "private, loopback or link-local" in refused(made, 502, "lora-host-refused")
    assert fake.downloads() == []
    next_works(fake, made)


def test_the_connection_goes_to_the_address_that_was_checked(fake: FakeCivitai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose second resolution differs from the first: what a rebinding attack does."""
    answers = iter(["127.0.0.2", "127.0.0.9"])
    real = socket.getaddrinfo
    asked: list[str] = []

    def rebinding(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in ("files.example", b"files.example"):
            asked.append("files.example")
            host = next(answers)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    fake.faults.redirect = f"http://files.example:{fake.files_url.split(':')[-1]}/files/10"
    made = installer(fake, tmp_path, allowed_hosts=["files.example"], allow_private_hosts=["127.0.0.1", "files.example"])
    add(made)
    assert asked == ["files.example"]
    assert fake.downloads()[0].headers["Host"].startswith("files.example")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False), ("::1", False), ("::", False),
        ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:7f00:1::", False), ("ff02::1", False), ("fec0::1", False), ("::127.0.0.1", False), ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),
    ],
)
def test_what_counts_as_a_public_address(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_the_key_goes_to_civitai_alone(fake: FakeCivitai, tmp_path: Path) -> None:
    add(installer(fake, tmp_path))
    for request in fake.seen:
        assert KEY not in request.path
        assert request.headers.get("Authorization") == (f"Bearer {KEY}" if request.host == "127.0.0.1" else None)
        assert request.headers["User-Agent"].startswith("Easel/")


def test_without_a_key_none_is_sent_and_a_401_says_what_to_set(fake: FakeCivitai, tmp_path: Path) -> None:
    made = Installer(Settings(loras=fake.settings()), Secrets(civit_key=""), tmp_path)
    fake.faults.download_status, fake.faults.times = 401, 1
    assert "set CIVIT_KEY" in refused(made, 502, "lora-source-unauthorized")
    add(made)
    assert all("Authorization" not in s.headers for s in fake.seen)


def test_no_log_has_the_key_or_a_signed_address(fake: FakeCivitai, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = installer(fake, tmp_path)
    add(made)
    fake.faults.file = "cut"
    fake.contents[20] = fake.contents[20][:1]  # each cut brings nothing
    with pytest.raises(Problem):
        add(made, 2)
    assert "HTTP Request: GET http://127.0.0.2" in caplog.text  # httpx does log
    assert KEY not in caplog.text
    assert SIGNATURE not in caplog.text


def test_redirects_without_end_are_refused(fake: FakeCivitai, tmp_path: Path) -> None:
    fake.faults.redirect = f"{fake.url}/api/download/models/10"
    assert "redirects" in refused(installer(fake, tmp_path), 502, "lora-source-answer")
    assert len([seen for seen in fake.seen if seen.path.startswith("/api/download/")]) == 6  # the first, and five


@pytest.mark.parametrize(("value", "seconds"), [(None, None), ("", None), ("5", 5), ("-3", 0), ("nan", None), ("inf", None), ("soon", None), ("Sun, 06 Nov 1994 08:49:37 GMT", 0)])
def test_retry_after_is_read_in_both_forms(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


# Several at once


def test_one_added_twice_at_once_is_downloaded_once(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    fake.faults.file = "slow"

    async def both() -> list[Added]:
        return await asyncio.gather(*(made.start(AddLora(source=s)).result() for s in (1, "ghibli", "1@10")))

    answers = asyncio.run(both())
    assert sorted(a.already_there for a in answers) == [False, True, True]
    assert {a.name for a in answers} == {"Ghibli"}
    assert len(fake.downloads()) == 1


def test_the_second_goes_on_where_the_first_is_cancelled(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    fake.faults.file = "slow"

    async def run() -> tuple[Any, Added]:
        jobs = [made.start(AddLora(source=1)), made.start(AddLora(source=1))]
        await until(lambda: any(job.state.progress.bytes for job in jobs))
        jobs.sort(key=lambda job: -job.state.progress.bytes)  # either may have come first to the lock
        first, second = jobs
        await made.cancel(first.state.id)
        return first.state, await second.result()

    state, added = asyncio.run(run())
    assert state.status == "canceled"
    assert not added.already_there
    assert contents(made) == ["civitai-10.safetensors"]


@pytest.mark.parametrize("source", [1, 404])
def test_a_job_that_is_over_keeps_nothing_of_the_request_that_began_it(fake: FakeCivitai, tmp_path: Path, source: int) -> None:
    made = installer(fake, tmp_path)
    current: ContextVar[Any] = ContextVar("current")

    async def ask() -> tuple[Job, weakref.ref[Any]]:
        class Request:
            pass

        current.set(request := Request())
        job = made.start(AddLora(source=source))
        with contextlib.suppress(Problem):
            await job.result()
        return job, weakref.ref(request)

    async def run() -> None:
        job, request = await asyncio.create_task(ask())
        await asyncio.sleep(0)
        gc.collect()
        assert job.state.status == ("succeeded" if source == 1 else "failed")
        assert job.state.id in made.jobs
        assert request() is None

    asyncio.run(run())


def test_a_cancelled_job_leaves_nothing_and_tells_its_progress_before(fake: FakeCivitai, tmp_path: Path) -> None:
    made = installer(fake, tmp_path)
    fake.faults.file = "slow"

    async def run() -> None:
        job = made.start(AddLora(source=1))
        await until(lambda: job.state.progress.eta_s is not None)
        assert contents(made) == [".civitai-10.safetensors.lock", ".civitai-10.safetensors.part"]
        assert 0 < job.state.progress.value < 1
        assert job.state.progress.rate > 0
        await made.cancel(job.state.id)
        assert job.state.status == "canceled"
        with pytest.raises(Problem) as caught:
            await job.result()
        assert caught.value.details.status == 499
        assert (await made.cancel(job.state.id)).state.status == "canceled"
        never = made.start(AddLora(source=1))
        assert (await made.cancel(never.state.id)).state.status == "canceled"

    asyncio.run(run())
    assert contents(made) == []
    assert made.registry.entries() == {}
    next_works(fake, made)


@pytest.mark.parametrize("pause", [i / 100 for i in range(0, 30, 2)])
def test_whenever_it_is_cancelled_file_and_entry_are_there_together_or_not_at_all(fake: FakeCivitai, tmp_path: Path, pause: float) -> None:
    made = installer(fake, tmp_path)

    async def run() -> str:
        job = made.start(AddLora(source=1))
        await asyncio.sleep(pause)
        return (await made.cancel(job.state.id)).state.status

    status = asyncio.run(run())
    assert (status, list(made.registry.entries()), contents(made)) in (("canceled", [], []), ("succeeded", ["Ghibli"], ["civitai-10.safetensors"]))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("not within 10 s")


IN_A_PROCESS = """
import asyncio, json, sys
from contextvars import ContextVar
from pathlib import Path
from core.loras.installing import Installer, Job
from core.loras.messages import AddLora
from core.settings import Secrets, Settings
made = Installer(Settings(loras=json.loads(sys.argv[1])), Secrets(), Path(sys.argv[2]))
async def run():
    return await asyncio.gather(*(made.start(AddLora(source=int(i))).result() for i in sys.argv[3:]))
print(json.dumps([a.already_there for a in asyncio.run(run())]))
"""


def test_two_processes_add_at_once_and_lose_nothing(fake: FakeCivitai, tmp_path: Path) -> None:
    for i in range(3, 9):
        fake.add(i, f"style {i}", content=weights(i, 40))
    fake.faults.file = "slow"
    arguments = [json.dumps(fake.settings()), str(tmp_path)]
    processes = [
        subprocess.Popen([sys.executable, "-c", IN_A_PROCESS, *arguments, *map(str, ids)], cwd=ROOT, stdout=subprocess.PIPE)
        for ids in ((3, 4, 5, 1), (6, 7, 8, 1))
    ]
    answers = [json.loads(p.communicate(timeout=60)[0]) for p in processes]
    made = installer(fake, tmp_path)
    assert set(made.registry.entries()) == {"Ghibli", *(f"style {i}" for i in range(3, 9))}
    assert all(made.registry.file(lora).is_file() for lora in made.registry.entries().values())
    assert sorted(a[3] for a in answers) == [False, True]  # the one that both add
    assert len(fake.downloads()) == 7
    assert len(contents(made)) == 7
