"""The way out of every connection to an address that a user, a hub or a redirect names: scheme, host and address are
checked where it leaves. LoRA downloads (core.loras.egress) and webhooks (api.webhooks) go this way."""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from pydantic import SecretStr

from core.problems import Problem, problem

Origin = tuple[str, str, int | None]


@dataclass(frozen=True)
class Key:
    """A key for one origin, and the environment variable it comes from."""

    variable: str
    secret: SecretStr

    @property
    def value(self) -> str:
        return self.secret.get_secret_value().strip()


@dataclass(frozen=True)
class Rules:
    """Whom to connect to, by a section of the settings, and with which keys: origins with a key are always allowed."""

    section: str
    schemes: Sequence[str]
    hosts: list[str]
    private_hosts: list[str]
    connect_timeout_s: float
    keys: Mapping[Origin, Key] = field(default_factory=dict)

    def check(self, url: httpx.URL) -> None:
        """Whether scheme and host are allowed.

        Raises:
            Problem: 502.
        """
        if url.scheme not in self.schemes:
            raise self.refused(url.host, f"{url.scheme} is not among {self.section}.allowed_schemes ({', '.join(self.schemes)})")
        if origin(url) not in self.keys and not any(fnmatch.fnmatchcase(url.host.lower(), pattern.lower()) for pattern in self.hosts):
            raise self.refused(url.host, f"it is not among {self.section}.allowed_hosts")

    def refused(self, host: str, why: str) -> Problem:
        return problem(502, f"{self.section.rstrip('s')}-host-refused", "Host refused", f"Easel does not connect to {host[:200]}: {why}.")


class Checked(httpx.AsyncBaseTransport):
    """httpx's transport behind the checks. It connects to the very address that was checked, with
    the host's name for TLS and the Host header, so that a second name resolution cannot differ."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        # No kept connections: the pool knows them by address, and two hosts may share one.
        self._inner = httpx.AsyncHTTPTransport(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        self._rules.check(url)
        headers = request.headers.copy()
        headers.pop("Authorization", None)
        key = self._rules.keys.get(origin(url))
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

    async def _addresses(self, url: httpx.URL) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await asyncio.wait_for(loop.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM), self._rules.connect_timeout_s)
        except TimeoutError:
            raise httpx.ConnectTimeout("name resolution") from None
        except (OSError, UnicodeError):
            raise httpx.ConnectError("name resolution") from None
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        if url.host.lower() not in self._rules.private_hosts:
            for address in addresses:
                if not is_public(address):
                    raise self._rules.refused(url.host, f"it has a private, loopback or link-local address; {self._rules.section}.allow_private_hosts may allow it")
        return addresses


def is_public(address: str) -> bool:
    """Whether an address is out on the internet, by what it means: IPv4 inside IPv6 counts as IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in ipaddress.ip_network("64:ff9b::/96") else None
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None) or nat64
        if inner is not None:
            return is_public(str(inner))
    site = isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local  # what fc00::/7 is now
    return ip.is_global and not (site or ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def origin(url: httpx.URL) -> Origin:
    return url.scheme, url.host.lower(), url.port
