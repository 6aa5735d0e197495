"""Every connection Easel opens to fetch a LoRA: to whom, with which key, and how often it tries.

`client` makes an httpx client whose every hop, redirects included, passes the checks of core.egress, with a key only for the
host that it belongs to. core.loras.civitai, core.loras.hub and core.loras.download are its users.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from core import __version__
from core.egress import Checked, Key, Rules, origin
from core.outgoing import parse_retry_after, quiet_logs
from core.problems import Problem, problem, unavailable
from core.settings import Loras, Secrets

ANSWER_BYTES = 16 * 1024 * 1024
REDIRECTS = 5
# A browser's User-Agent would get a login page from Civitai instead of a 401.
_HEADERS = {"User-Agent": f"Easel/{__version__}", "Accept-Encoding": "identity"}


class Transient(Exception):
    """What may go well the next time; `problem` is the answer where it does not."""

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(problem.details.detail)
        self.problem, self.retry_after = problem, retry_after


class Egress:
    """The way out, by the settings."""

    def __init__(self, settings: Loras, secrets: Secrets) -> None:
        self.settings = settings
        self.keys = {
            origin(httpx.URL(settings.civitai_url)): Key("CIVIT_KEY", secrets.civit_key),
            origin(httpx.URL(settings.hub_url)): Key("HF_TOKEN", secrets.hf_token),
        }
        self.rules = Rules("loras", settings.allowed_schemes, settings.allowed_hosts, settings.allow_private_hosts, settings.connect_timeout_s, self.keys)

    def client(self) -> httpx.AsyncClient:
        """A client for one job. No proxy or netrc from the environment: they would see the keys."""
        quiet_logs()
        s = self.settings
        timeout = httpx.Timeout(s.stall_timeout_s, connect=s.connect_timeout_s, pool=s.connect_timeout_s)
        return httpx.AsyncClient(
            transport=Checked(self.rules), headers=_HEADERS, timeout=timeout, follow_redirects=True, max_redirects=REDIRECTS, trust_env=False
        )

    async def json(self, client: httpx.AsyncClient, url: str, params: Any = None) -> dict[str, Any]:
        """GET a JSON object, with retries.

        Raises:
            Problem: 404 or 410 where it is not there, 502 for a refusal or another answer than JSON,
                503 where it cannot be had now, 504 where it stalls.
        """
        try:
            async for attempt in self.retrying():
                with attempt:
                    return await self._json(client, url, params)
        except Transient as error:
            raise error.problem from None
        raise AssertionError("unreachable")

    async def _json(self, client: httpx.AsyncClient, url: str, params: Any) -> dict[str, Any]:
        host = httpx.URL(url).host
        body = bytearray()
        with self.explained(host):
            async with client.stream("GET", url, params=params) as response:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_BYTES:
                        raise bad_answer(host, f"more than {ANSWER_BYTES} bytes")
        if response.status_code != 200:
            raise self.refusal(response, bytes(body))
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            kind = response.headers.get("content-type", "no type").split(";")[0][:60]
            raise bad_answer(host, f"{kind} instead of JSON") from None
        if not isinstance(content, dict):
            raise bad_answer(host, "JSON that is no object")
        return content

    def retrying(self, failures: Callable[[RetryCallState], int] = lambda state: state.attempt_number) -> AsyncRetrying:
        """Retries of what is `Transient`: waits double from retry_wait_s, or are what Retry-After
        asks for; a server that asks for more than max_wait_s is not waited for."""
        s = self.settings

        def stop(state: RetryCallState) -> bool:
            return failures(state) >= s.attempts or (_retry_after(state) or 0) > s.max_wait_s

        def wait(state: RetryCallState) -> float:
            backoff = min(s.retry_wait_s * 2.0 ** max(failures(state) - 1, 0), s.max_wait_s)
            return max(_retry_after(state) or 0.0, float(backoff) * random.uniform(0.75, 1.25))

        return AsyncRetrying(retry=retry_if_exception_type(Transient), stop=stop, wait=wait, reraise=True)

    def refusal(self, response: httpx.Response, body: bytes) -> Problem | Transient:
        """What an answer other than the expected one means. `body`: its beginning."""
        host, status = response.url.host, response.status_code
        key = self.keys.get(origin(response.url))
        said = self._said(body)
        if status in (408, 429) or status >= 500:
            after = parse_retry_after(response.headers.get("retry-after"))
            why = "asks to come back later (429)" if status == 429 else f"fails ({status})"
            wait = min(int(after if after is not None else 60) + 1, 86400)
            return Transient(unavailable(f"{host} {why}{said}. Try again later.", retry_after=wait, slug="lora-source-busy"), after)
        if status == 401:
            hint = f"set {key.variable}" if key and not key.value else f"check {key.variable}" if key else "it wants a key that Easel has not"
            return problem(502, "lora-source-unauthorized", "Source wants a key", f"{host} refuses access (401){said}: {hint}.")
        if status == 403:
            return problem(502, "lora-source-forbidden", "Source forbids it", f"{host} forbids it (403){said}.")
        if status == 404:
            return problem(404, "lora-not-found", "No such LoRA", f"{host} has no such thing (404){said}.")
        if status == 410:
            return problem(410, "lora-archived", "No longer there", f"{host} no longer has it (410){said}.")
        return problem(502, "lora-source-refused", "Source refused", f"{host} answered {status}{said}.")

    @contextlib.contextmanager
    def explained(self, host: str) -> Iterator[None]:
        """Turn httpx's errors into ours, which name the host and never a signed URL."""
        try:
            try:
                yield
            except httpx.RequestError as error:
                host = error.request.url.host or host  # that of the redirect, where it was one
                raise
        except httpx.TooManyRedirects:
            raise bad_answer(host, f"more than {REDIRECTS} redirects") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise Transient(unavailable(f"{host} cannot be reached. Check the network.", retry_after=60, slug="lora-source-unreachable")) from None
        except httpx.TimeoutException:
            detail = f"{host} sent nothing for {self.settings.stall_timeout_s:g} s: the line or the server stalls. Try again later."
            raise Transient(problem(504, "lora-source-stalled", "Source stalled", detail)) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.DecodingError):
            raise bad_answer(host, "an address that cannot be followed") from None
        except httpx.TransportError:
            raise Transient(problem(502, "lora-source-cut", "Connection cut", f"The connection to {host} broke off. Try again.", retry_after=10)) from None

    def _said(self, body: bytes) -> str:
        """What a JSON error says, with nothing in it that is secret."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return ""
        if not isinstance(content, dict):
            return ""
        words = ", ".join(str(content[k]) for k in ("error", "message", "deadline") if isinstance(content.get(k), str))
        for key in self.keys.values():
            if key.value:
                words = words.replace(key.value, "[key]")
        words = "".join(c if c.isprintable() else " " for c in words)[:300]
        return f": {words}" if words else ""


def _retry_after(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, Transient) else None


def bad_answer(host: str, what: str) -> Problem:
    return problem(502, "lora-source-answer", "Unexpected answer", f"{host} sent {what}.")
