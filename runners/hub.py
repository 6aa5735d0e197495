"""What was had from the model hub. It is asked once for each thing while a process lives: asking takes a while, and a hub that is slow
or counts its callers' questions would hold up every picture."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

_there: dict[Hashable, Path] = {}


def once(key: Hashable, download: Callable[[], Path]) -> Path:
    """What `download` returned for the key, or returns now: the first time, and where the files are gone since."""
    path = _there.get(key)
    if path is None or not path.exists():
        path = _there[key] = download()
    return path
