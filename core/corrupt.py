"""SQLite files that are corrupt are moved aside, so that a new one can begin and whoever wants to save the old one has it."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from pathlib import Path


def is_corrupt(error: BaseException | None) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def move_aside(file: Path) -> Path:
    """Rename a file that nobody here has open, with what SQLite keeps beside it; returns its new path."""
    stamp = time.strftime("%Y%m%dT%H%M%S")
    aside = next(p for n in itertools.count() if not (p := file.with_name(f"{file.name}.corrupt-{stamp}-{n}")).exists())
    file.rename(aside)
    for end in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            file.with_name(file.name + end).rename(aside.with_name(aside.name + end))
    return aside
