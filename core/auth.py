"""API keys: who calls, and what they may do.

Keys come from API_KEY and ADMIN_API_KEY, several separated by commas. They are compared in
constant time and known elsewhere only by a short hash.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal

from pydantic import SecretStr

from core.settings import Secrets, Settings

Role = Literal["user", "admin"]


@dataclass(frozen=True)
class Caller:
    """Who sent a request. `id` is a hash of the key: fit for queues and logs."""

    id: str
    role: Role


ANYONE = Caller("anyone", "admin")


def admins(settings: Settings, secrets: Secrets) -> set[str]:
    """The ids of the admin keys; anyone is one where keys are off."""
    return {ANYONE.id} if settings.auth.mode == "off" else {_identity(key) for key in _separate(secrets.admin_api_key)}


class NoKeys(RuntimeError):
    """No key is configured, and `auth.mode: off` was not chosen."""


class Keys:
    """The configured keys.

    Raises:
        NoKeys: where there is none and auth.mode is not off.
    """

    def __init__(self, settings: Settings, secrets: Secrets) -> None:
        self.off = settings.auth.mode == "off"
        self._keys: list[tuple[bytes, Caller]] = []
        for role, secret in (("admin", secrets.admin_api_key), ("user", secrets.api_key)):
            for key in _separate(secret):
                self._keys.append((key.encode(), Caller(_identity(key), "admin" if role == "admin" else "user")))
        self._entry = secrets.runner_key.get_secret_value().strip().encode()
        if not self._entry and (settings.stable_diffusion.urls or settings.unidiffuser.urls):
            raise NoKeys("Workers are served elsewhere (urls), and RUNNER_KEY is not set, which the entry shows to them.")
        if not self._keys and not self.off:
            raise NoKeys(
                "No API key is configured. Set API_KEY and ADMIN_API_KEY in the environment or in .env "
                "(`make keys` writes random ones), or set auth.mode: off to serve this machine alone."
            )

    def caller(self, headers: dict[str, str], basic: bool = False) -> Caller | None:
        """Who the headers (lower-case names) prove to be; None for nobody. Takes the same time for
        every wrong key: all keys are compared, each in constant time.

        Args:
            basic: take HTTP Basic too, the key being its password; any user name will do.
        """
        if self.off:
            return ANYONE
        given = _given(headers, basic)
        found = None
        for key, caller in self._keys:
            if hmac.compare_digest(key, given) and found is None:
                found = caller
        return found

    def entry(self, headers: dict[str, str]) -> bool:
        """Whether the headers prove an entry that is served elsewhere (RUNNER_KEY)."""
        return bool(self._entry) and hmac.compare_digest(self._entry, _given(headers))


def _given(headers: dict[str, str], basic: bool = False) -> bytes:
    given = headers.get("x-api-key", "")
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if not given and scheme.lower() == "bearer":
        given = token.strip()
    elif not given and basic and scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(token.strip(), validate=True).partition(b":")[2]
    return given.encode("utf-8", "surrogateescape")


def _separate(secret: SecretStr) -> list[str]:
    """The keys of a setting that may hold several."""
    return [key for part in secret.get_secret_value().split(",") if (key := part.strip())]


def _identity(key: str) -> str:
    """What a key is known by elsewhere."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]
