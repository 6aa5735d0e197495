"""A model's weight files: which of them are read, what they take in memory, and their SHA-256.

runners.loading asks for the hash beside the queue, runners.residency for the bytes before it makes
room. Only headers are read for the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

_DENOISERS = ("unet", "transformer")
_NOT_LOADED = ("safety_checker",)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def files(path: Path, variant: str | None) -> list[Path]:
    """The safetensors files that loading `path` reads: the single file, or each component's in the
    wanted variant ("fp16"), in its plain one where there is no such variant."""
    if path.is_file():
        return [path]
    with os.scandir(path) as entries:  # every request asks: a folder that has not changed is not listed again
        folders = sorted((e.path, e.stat().st_mtime_ns) for e in entries if e.is_dir() and e.name not in _NOT_LOADED)
    return [file for folder, modified in folders for file in _listed(Path(folder), variant, modified)]


@lru_cache(maxsize=256)
def _listed(folder: Path, variant: str | None, _modified: int) -> list[Path]:
    """A component's files in the wanted variant."""
    every = sorted(folder.glob("*.safetensors"))
    wanted = [f for f in every if variant and f".{variant}" in f.name]
    return wanted or [f for f in every if f.name.count(".") == 1] or every


def numbers(path: Path, variant: str | None) -> dict[str, list[int]]:
    """How many numbers each tensor holds, by the files' headers and by component ("" for a single file)."""
    found: dict[str, list[int]] = {}
    whole = path.is_file()
    for file in files(path, variant):
        found.setdefault("" if whole else file.parent.name, []).extend(_numbers(file, file.stat().st_mtime_ns))
    return found


def total(files: Iterable[Path]) -> int:
    """How many numbers some files hold in all, by their headers; one that is not there holds none."""
    return sum(sum(_numbers(file, file.stat().st_mtime_ns)) for file in files if file.is_file())


@lru_cache(maxsize=256)
def _numbers(file: Path, _modified: int) -> list[int]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        return [math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError):  # broken: loading will say so
        return []


def sha256(path: Path, variant: str | None) -> str:
    """The SHA-256 that stands for the model: of the single file, or of the denoiser's (UNet or
    transformer) file in a folder; where that is in several shards, of their hashes, one a line.

    Computed once for each file as it is; what the hub's cache has named by its hash is not read again.
    """
    every = files(path, variant)
    chosen = [f for f in every if f.parent.name in _DENOISERS] if path.is_dir() else every
    hashes = [sha256_of(file) for file in chosen]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """A file's SHA-256."""
    blob = file.resolve()
    stat = blob.stat()
    return blob.name if _SHA256.fullmatch(blob.name) else _hash(blob, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _hash(file: Path, _modified: int, _size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
