"""Every connection Easel opens to fetch a LoRA: to whom, with which key, and how often it tries.

`client` makes an httpx client whose every hop, redirects included, is checked where it leaves:
scheme and host against the settings, the address after name resolution, and the key only for the
host that it belongs to. core.loras.civitai, core.loras.hub and core.loras.download are its users.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import ipaddress
import json
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from core import __version__
from core.outgoing import parse_retry_after, quiet_logs
from core.problems import Problem, problem, unavailable
from core.settings import Loras, Secrets

ANSWER_BYTES = 16 * 1024 * 1024
REDIRECTS = 5
# A browser's User-Agent would get a login page from Civitai instead of a 401.
_HEADERS = {"User-Agent": f"Easel/{__version__}", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Key:
    """A key for one origin, and the environment variable it comes from."""

    variable: str
    secret: SecretStr

    @property
    def value(self) -> str:
        return self.secret.get_secret_value().strip()


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
            _origin(httpx.URL(settings.civitai_url)): Key("CIVIT_KEY", secrets.civit_key),
            _origin(httpx.URL(settings.hub_url)): Key("HF_TOKEN", secrets.hf_token),
        }

    def client(self) -> httpx.AsyncClient:
        """A client for one job. No proxy or netrc from the environment: they would see the keys."""
        quiet_logs()
        s = self.settings
        timeout = httpx.Timeout(s.stall_timeout_s, connect=s.connect_timeout_s, pool=s.connect_timeout_s)
        return httpx.AsyncClient(
            transport=_Checked(self), headers=_HEADERS, timeout=timeout, follow_redirects=True, max_redirects=REDIRECTS, trust_env=False
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
        key = self.keys.get(_origin(response.url))
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


class _Checked(httpx.AsyncBaseTransport):
    """httpx's transport behind the checks. It connects to the very address that was checked, with
    the host's name for TLS and the Host header, so that a second name resolution cannot differ."""

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        # No kept connections: the pool knows them by address, and two hosts may share one.
        self._inner = httpx.AsyncHTTPTransport(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url, settings = request.url, self._egress.settings
        if url.scheme not in settings.allowed_schemes:
            raise _refused(url.host, f"{url.scheme} is not among loras.allowed_schemes ({', '.join(settings.allowed_schemes)})")
        if not self._listed(url):
            raise _refused(url.host, "it is not among loras.allowed_hosts")
        headers = request.headers.copy()
        headers.pop("Authorization", None)
        key = self._egress.keys.get(_origin(url))
        if key and key.value:
            headers["Authorization"] = f"Bearer {key.value}"
        failure: Exception | None = None
        for address in await self._addresses(url):
            pinned = httpx.Request(
                request.method, url.copy_with(host=address), headers=headers, stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.host},
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure or httpx.ConnectError("no address")

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _listed(self, url: httpx.URL) -> bool:
        if _origin(url) in self._egress.keys:
            return True
        return any(fnmatch.fnmatchcase(url.host.lower(), pattern.lower()) for pattern in self._egress.settings.allowed_hosts)

    async def _addresses(self, url: httpx.URL) -> list[str]:
        settings = self._egress.settings
        loop = asyncio.get_running_loop()
        try:
            found = await asyncio.wait_for(loop.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM), settings.connect_timeout_s)
        except TimeoutError:
            raise httpx.ConnectTimeout("name resolution") from None
        except (OSError, UnicodeError):
            raise httpx.ConnectError("name resolution") from None
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        if url.host.lower() not in settings.allow_private_hosts:
            for address in addresses:
                if not is_public(address):
                    raise _refused(url.host, "it has a private, loopback or link-local address; loras.allow_private_hosts may allow it")
        return addresses


def is_public(address: str) -> bool:
    """Whether an address is out on the internet, by what it means: IPv4 inside IPv6 counts as IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in ipaddress.ip_network("64:ff9b::/96") else None
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None) or nat64
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


def _retry_after(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, Transient) else None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host.lower(), url.port


def _refused(host: str, why: str) -> Problem:
    return problem(502, "lora-host-refused", "Host refused", f"Easel does not connect to {host[:200]}: {why}.")


def bad_answer(host: str, what: str) -> Problem:
    return problem(502, "lora-source-answer", "Unexpected answer", f"{host} sent {what}.")
