"""Pictures kept for a while under addresses that cannot be guessed, for answers that give a URL instead of bytes.

In this process's memory: what is kept is gone with it, and with time.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from core.problems import problem


@dataclass(frozen=True)
class Kept:
    """A file, and when (of `time.monotonic`) it goes."""

    data: bytes
    media_type: str
    until: float


class Links:
    """The files, at most `most_bytes` of them together; the oldest go first.

    Args:
        retention_s: how long each is kept, seconds.
    """

    def __init__(self, retention_s: float, most_bytes: int) -> None:
        self.retention_s, self.most_bytes = retention_s, most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, media_type: str) -> str:
        """Take a file; answers its name, of 256 random bits.

        Raises:
            Problem: 507 where it is larger than all that may be kept.
        """
        if len(data) > self.most_bytes:
            raise problem(507, "link-too-large", "Too large to keep", f"The picture has {len(data)} bytes, and links.bytes is {self.most_bytes}. Ask for it as b64_json.")
        self._sweep(self.most_bytes - len(data))
        name = secrets.token_urlsafe(32)
        self._kept[name] = Kept(data, media_type, time.monotonic() + self.retention_s)
        self._bytes += len(data)
        return name

    def find(self, name: str) -> Kept | None:
        """The file of a name; None for an unknown one, or one that has expired."""
        self._sweep(self.most_bytes)
        return self._kept.get(name)

    def _sweep(self, most_bytes: int) -> None:
        """Drop what has expired, and the oldest until the rest has at most so many bytes."""
        now = time.monotonic()
        while self._kept and (self._bytes > most_bytes or next(iter(self._kept.values())).until <= now):
            self._bytes -= len(self._kept.popitem(last=False)[1].data)
