"""One file from the network to its place on disk, over slow and broken lines.

It is streamed to a temporary file, resumed where the line broke, checked (length, SHA-256,
safetensors header) and only then renamed into place. Where that fails nothing is left behind.
core.loras.installing calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from filelock import AsyncFileLock
from tenacity import RetryCallState

from core.loras.contents import check_weights
from core.loras.egress import Egress, Transient, bad_answer
from core.loras.listfile import sync_folder
from core.loras.registry import Kind, cannot_write
from core.problems import Problem, problem

CHUNK = 1024 * 1024
UPLOAD = ".upload-"  # how the temporary file of an upload begins
_NOT_FILES = ("text/", "application/json", "application/xhtml", "application/xml", "application/problem")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@dataclass(frozen=True)
class Remote:
    """A file to fetch. `size` is a hint (Civitai rounds it); `sha256` (hexadecimal) is binding."""

    url: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Local:
    """A file that was checked: its SHA-256 in lower case, its bytes, and what it holds."""

    sha256: str
    size: int
    kind: Kind


Progress = Callable[[int, int | None], None]  # bytes so far, and in all where known


@contextlib.asynccontextmanager
async def held(target: Path) -> AsyncIterator[None]:
    """Be the only one, among all processes, that makes the file `target`."""
    lock = target.with_name(f".{target.name}.lock")
    # In this thread: one that ran beside it could take the lock after a cancellation, for nobody.
    flock = AsyncFileLock(lock, poll_interval=0.1, run_in_executor=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        await flock.acquire()
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone and makes another
        await flock.release()


async def download(egress: Egress, remote: Remote, target: Path, progress: Progress = lambda done, total: None, kind: Kind | None = None) -> Local:
    """Fetch `remote`, which must be of `kind` where that is given, to `target`, whose folder exists;
    call it inside `held(target)`.

    Raises:
        Problem: whatever stands in the way; then there is no temporary file and no `target`.
    """
    temporary = target.with_name(f".{target.name}.part")
    try:
        with temporary.open("wb") as file:
            fetch = _Fetch(egress, remote, file, target, progress)
            async with asyncio.timeout(egress.settings.deadline_s):
                await fetch.run()
        sha256 = fetch.hash.hexdigest()
        if remote.sha256 and sha256 != remote.sha256.lower():
            raise problem(502, "lora-wrong-hash", "Wrong hash", f"{fetch.host} sent a file whose SHA-256 is {sha256}; it should be {remote.sha256.lower()}. Nothing was kept.")
        found = await asyncio.to_thread(check_weights, temporary, 502, kind)
        try:
            await uninterrupted(settle, temporary, target)
        except asyncio.CancelledError:
            target.unlink(missing_ok=True)
            raise
        return Local(sha256, fetch.done, found)
    except TimeoutError:
        raise problem(504, "lora-deadline", "Took too long", f"The download was not done within loras.deadline_s ({egress.settings.deadline_s:g} s).") from None
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


async def uninterrupted(call: Callable[..., object], *args: object) -> None:
    """Call in a thread, to its end: a cancellation takes effect after it."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await work
        raise


class _Fetch:
    """The state of one download across its attempts."""

    def __init__(self, egress: Egress, remote: Remote, file: IO[bytes], target: Path, progress: Progress) -> None:
        self.egress, self.remote, self.file, self.target, self.progress = egress, remote, file, target, progress
        self.host = httpx.URL(remote.url).host
        self.done = 0
        self.total: int | None = None
        self.hash = hashlib.sha256()
        self.validator: str | None = None
        self.failures = 0

    async def run(self) -> None:
        """Try until the file is whole, or as many attempts in a row as loras.attempts brought nothing."""
        try:
            async for attempt in self.egress.retrying(self._failures):
                with attempt:
                    await self._once()
        except Transient as error:
            raise error.problem from None

    def _failures(self, _: RetryCallState) -> int:
        return self.failures

    async def _once(self) -> None:
        before = self.done
        try:
            # A client for each attempt: the signed address of the last one may have run out.
            async with self.egress.client() as client:
                with self.egress.explained(self.host):
                    await self._stream(client)
        except Transient:
            self.failures = 1 if self.done > before else self.failures + 1
            raise

    async def _stream(self, client: httpx.AsyncClient) -> None:
        headers = {"Range": f"bytes={self.done}-", "If-Range": self.validator} if self.done and self.validator else {}
        async with client.stream("GET", self.remote.url, headers=headers) as response:
            self.host = response.url.host
            if response.status_code == 416:
                self._restart()
                raise self._cut()
            if response.status_code not in (200, 206):
                body = b""
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > CHUNK:
                        break
                raise self.egress.refusal(response, body)
            self._begin(response)
            async for chunk in response.aiter_raw():
                if self.done + len(chunk) > self.egress.settings.max_bytes:
                    raise too_large(self.egress.settings.max_bytes)
                await asyncio.to_thread(self._take, chunk)
                self.progress(self.done, self.total)
        if self.total is not None and self.done != self.total:
            raise self._cut()

    def _begin(self, response: httpx.Response) -> None:
        """Check what is about to come, and go on where it does: at the beginning unless resumed."""
        kind = response.headers.get("content-type", "").lower()
        if kind.startswith(_NOT_FILES):
            what = "a web page, such as a login, or a message" if "json" not in kind else "a message"
            raise bad_answer(self.host, f"{what} instead of a file ({kind.split(';')[0][:60]})")
        length = response.headers.get("content-length", "")
        ranged = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if response.status_code == 206:
            if ranged is None or int(ranged[1]) != self.done or (self.total is not None and int(ranged[2]) != self.total):
                self._restart()
                raise self._cut()
            self.total = int(ranged[2])
        else:
            self._restart()
            self.total = int(length) if length.isdigit() else None
            tag = response.headers.get("etag", "")
            self.validator = tag if tag.startswith('"') else response.headers.get("last-modified")
        settings = self.egress.settings
        if (self.total or 0) > settings.max_bytes:
            raise too_large(settings.max_bytes, self.total)
        free = shutil.disk_usage(self.target.parent).free
        if (self.total or 0) - self.done > free:
            raise problem(507, "disk-full", "Disk full", f"{self.target.name} has {self.total} bytes and {self.target.parent} has room for {free}. Free some space and try again; nothing was changed.")

    def _take(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.hash.update(chunk)
        self.done += len(chunk)

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.hash, self.done, self.total, self.validator = hashlib.sha256(), 0, None, None

    def _cut(self) -> Transient:
        return Transient(problem(502, "lora-source-cut", "Connection cut", f"{self.host} sent {self.done} of {self.total or 'an unknown number of'} bytes. Try again.", retry_after=10))


def settle(temporary: Path, target: Path) -> None:
    """Rename a file that is written and checked into place, readable as other files are, for good."""
    umask = os.umask(0)
    os.umask(umask)
    with temporary.open("rb") as file:
        os.fchmod(file.fileno(), 0o666 & ~umask)
        os.fsync(file.fileno())
    os.replace(temporary, target)
    sync_folder(target.parent)


def sweep(folder: Path, older_than_s: float = 24 * 3600) -> None:
    """Delete temporary files that a killed process left: those untouched for long."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".*"):
            if path.suffix in (".part", ".lock") and time.time() - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)


def too_large(limit: int, size: int | None = None) -> Problem:
    has = f"has {size} bytes" if size else "is larger"
    return problem(413, "lora-too-large", "LoRA too large", f"The file {has}; loras.max_bytes allows {limit}.")
