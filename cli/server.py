"""Calls to a server: with the key, errors as one line, and jobs followed to their end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import connect_sse

Json = dict[str, Any]
ACTIVE = ("queued", "running", "canceling")
TIMEOUT = httpx.Timeout(60, connect=10)  # the events have a sign of life every 15 s
ATTEMPTS = 30  # to hear of a job again, a second apart: a server may be starting anew


class Refused(Exception):
    """What the server refused, or why it could not be asked, in one line. `problem` is its own account, where it gave one."""

    def __init__(self, line: str, problem: Json | None = None) -> None:
        super().__init__(" ".join(line.split()))
        self.problem = problem


def keys() -> dict[str, str]:
    """The user's and the admin's key: EASEL_API_KEY for both, or those that the server has, in the environment or in `.env` here."""
    if key := os.environ.get("EASEL_API_KEY"):
        return {"user": key, "admin": key}
    lines = Path(".env").read_text(encoding="utf-8").splitlines() if Path(".env").is_file() else []
    values = dict(line.split("=", 1) for line in lines if "=" in line) | os.environ
    user, admin = (values.get(name, "").split(",")[0].strip().strip("\"'") for name in ("API_KEY", "ADMIN_API_KEY"))
    return {"user": user or admin, "admin": admin or user}


class Server:
    """A server at `url`."""

    def __init__(self, url: str) -> None:
        self.url, self._keys = url.rstrip("/"), keys()
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT)

    def headers(self, role: str) -> dict[str, str]:
        """What shows the key of a role, where there is one."""
        key = self._keys[role]
        return {"X-API-Key": key} if key else {}

    def call(self, method: str, path: str, role: str = "user", **sent: Any) -> httpx.Response:
        """A call that must succeed.

        Raises:
            Refused: where it does not.
        """
        try:
            answer = self._http.request(method, path, headers=self.headers(role) | sent.pop("headers", {}), **sent)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise unreachable(self.url, error) from error
        return checked(answer)

    def get(self, path: str, role: str = "user", **sent: Any) -> Any:
        return self.call("GET", path, role, **sent).json()

    def follow(self, job: Json) -> Iterator[Json]:
        """A job's snapshots, until it is over. A connection that breaks is made anew.

        Raises:
            Refused: where the server refuses to tell, or is away for longer than half a minute.
        """
        heard, failures = "", 0
        while job["status"] in ACTIVE:
            try:
                with connect_sse(self._http, "GET", job["urls"]["events"], headers=self.headers("user") | ({"Last-Event-ID": heard} if heard else {})) as source:
                    if source.response.is_error:
                        source.response.read()
                        checked(source.response)
                    for event in source.iter_sse():
                        if event.event in ("status", "progress"):
                            job, heard, failures = event.json(), event.id, 0
                            yield job
            except (httpx.TransportError, Refused) as error:
                gone = isinstance(error, httpx.TransportError) or (error.problem or {}).get("status") == 503
                failures += 1
                if not gone or failures >= ATTEMPTS:
                    raise unreachable(self.url, error) if isinstance(error, httpx.TransportError) else error from None
                time.sleep(1)

    def done(self, job: Json) -> Json:
        """A job that is over, if it succeeded.

        Raises:
            Refused: where it did not.
        """
        if job["status"] != "succeeded":
            problem = job["error"]
            raise Refused(f"{job['id']} {job['status']}" + (f": {line(problem)}" if problem else "."), problem)
        return job


def checked(answer: httpx.Response) -> httpx.Response:
    """A good answer. Raises: Refused: for any other."""
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        raise Refused(f"{answer.status_code} {answer.reason_phrase} from {answer.url.copy_with(query=None)}: not a server of Easel's?")
    after = answer.headers.get("retry-after")
    raise Refused(line(problem) + (f" Again in {after} s." if after else ""), {"status": answer.status_code, **problem})


def unreachable(url: str, error: Exception) -> Refused:
    return Refused(f"{url} does not answer ({error or type(error).__name__}). EASEL_URL names the server.")


def line(problem: Json) -> str:
    """A problem (RFC 9457) as one line: what was wrong, and what is allowed."""
    text = str(problem.get("detail") or problem.get("title") or problem).rstrip(".") + "."
    allowed = [(e["field"], e["allowed"]) for e in problem.get("errors") or [] if e.get("allowed")]
    return text + "".join(f" {field} allows: {given if isinstance(given, str) else ', '.join(map(str, given))}."[:300] for field, given in allowed)
