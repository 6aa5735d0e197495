"""Files that the server made, as it sent them, under names of their own: what is there already is never written over."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif", "video/mp4": ".mp4", "text/plain": ".txt", "application/json": ".json"}
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def slug(text: str) -> str:
    """A prompt as the beginning of a file's name."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-_")[:40].strip("-_") or "picture"


def save(folder: Path, stem: str, suffix: str, data: bytes) -> Path:
    """Write a new file, numbered where there is one of that name.

    Raises:
        OSError: where it cannot be written; then nothing of it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}{suffix}"
        try:
            file = path.open("xb")
        except FileExistsError:
            continue
        try:
            with file:
                file.write(data)
        except OSError:
            path.unlink()
            raise
        return path
    raise AssertionError("unreachable")
