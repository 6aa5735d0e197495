"""The usage log: which key had how many pictures made, with which model, LoRAs and embeddings.

An append-only SQLite file, written after each answer and read by GET /admin/usage. Keys stand in it
by their hash, prompts do not. Failing to write is logged and never fails a request; a file that is
corrupt is moved aside and a new one begun. An older version's file is brought to this one, a newer
one's is left alone: neither written nor read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from core import corrupt
from core.generation import Generation
from core.plans import Plan
from core.versions import LaterVersion

log = logging.getLogger("easel.usage")
T = TypeVar("T")
Group = Literal["key", "model", "lora", "day", "commercial"]
GROUPS: tuple[Group, ...] = get_args(Group)

# One row a request, and one for each LoRA of it. The triggers keep what was written.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, pictures INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, steps INTEGER NOT NULL,
    commercial INTEGER NOT NULL, commercial_use INTEGER NOT NULL, credit TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS usage_loras (
    usage INTEGER NOT NULL REFERENCES usage (id), lora TEXT NOT NULL, weight REAL NOT NULL, sha256 TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS usage_at ON usage (at);
CREATE INDEX IF NOT EXISTS usage_loras_usage ON usage_loras (usage);
CREATE TRIGGER IF NOT EXISTS usage_kept BEFORE DELETE ON usage BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS usage_unchanged BEFORE UPDATE ON usage BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS usage_loras_kept BEFORE DELETE ON usage_loras BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS usage_loras_unchanged BEFORE UPDATE ON usage_loras BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
# What a file of an earlier version lacks, by the version (SQLite's user_version) that brought it.
_ADDED = ["ALTER TABLE usage ADD COLUMN flagged INTEGER NOT NULL DEFAULT 0"]
_COLUMNS: dict[Group, str] = {
    "key": "u.key", "model": "u.model", "lora": "l.lora", "day": "date(u.at, 'unixepoch')", "commercial": "u.commercial",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a report. `group` has a value for each of the asked groups (None: no LoRA);
    `picture_steps` is the sum of pictures times steps, `flagged` of the pictures that the safety checker replaced."""

    group: dict[Group, str | None]
    requests: int
    pictures: int
    picture_steps: int
    flagged: int = 0


class Ledger:
    """The log at `path`. Every process that answers requests may have one on the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def prepare(self) -> None:
        """Bring the file, where there is one, to this version, before anything is written down.

        Raises:
            LaterVersion: see there. Whatever else is wrong is logged, and tried again with the next request.
        """
        if not self.path.exists():
            return
        try:
            self._use(lambda _: None)
        except LaterVersion:
            raise
        except (sqlite3.Error, OSError) as error:
            log.error("the usage log %s cannot be used: %s", self.path, error)

    def append(self, plan: Plan, generation: Generation) -> None:
        """Write down what was drawn; whatever goes wrong is logged, not raised."""
        ran = generation.ran
        if ran is None:
            return
        row = (
            time.time(), plan.client, ran.model_id, len(generation.pictures), ran.width, ran.height, ran.steps_run,
            plan.commercial, ran.commercial_use, json.dumps(ran.credit, ensure_ascii=False), len(ran.flagged or []),
        )  # fmt: skip

        parts = [(x.name, x.weight, x.sha256) for x in ran.loras] + [(x.name, 1.0, x.sha256) for x in ran.embeddings]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                added = connection.execute(
                    "INSERT INTO usage (at, key, model, pictures, width, height, steps, commercial, commercial_use, credit, flagged) VALUES (?,?,?,?,?,?,?,?,?,?,?)", row
                )
                connection.executemany("INSERT INTO usage_loras VALUES (?,?,?,?)", [(added.lastrowid, *part) for part in parts])

        try:
            self._use(write)
        except (sqlite3.Error, OSError) as error:
            log.error("a request of %s pictures is not in the usage log %s: %s", len(generation.pictures), self.path, error)

    def report(self, since: datetime | None, until: datetime | None, groups: list[Group]) -> list[Line]:
        """What was drawn from `since` on and before `until`, summed by `groups`, most pictures first.
        By LoRA, a request with two counts for both.

        Raises:
            sqlite3.Error, OSError: where the log cannot be read.
        """
        columns = [_COLUMNS[group] for group in groups]
        join = " LEFT JOIN usage_loras l ON l.usage = u.id" if "lora" in groups else ""
        query = (
            f"SELECT {''.join(c + ', ' for c in columns)}COUNT(*), COALESCE(SUM(u.pictures), 0), COALESCE(SUM(u.pictures * u.steps), 0), COALESCE(SUM(u.flagged), 0)"  # noqa: S608  # columns are of a fixed list
            f" FROM usage u{join} WHERE u.at >= ? AND u.at < ?"
            + (f" GROUP BY {', '.join(columns)} ORDER BY SUM(u.pictures) DESC, {', '.join(columns)}" if columns else "")
        )
        bounds = (since.timestamp() if since else 0.0, until.timestamp() if until else float("inf"))

        def read(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
            return connection.execute(query, bounds).fetchall()

        def shown(group: Group, value: Any) -> str | None:
            return str(bool(value)).lower() if group == "commercial" else value

        size = len(groups)
        return [Line({g: shown(g, v) for g, v in zip(groups, row[:size], strict=True)}, *row[size:]) for row in self._use(read)]

    def close(self) -> None:
        with self._lock:
            self._close()

    def _use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on the open file; once more on a new one where it is corrupt or was taken away."""
        with self._lock:
            if self._connection is not None and not self.path.exists():
                self._close()
            try:
                return work(self._open())
            except sqlite3.DatabaseError as error:
                self._close()
                if not corrupt.is_corrupt(error):
                    raise
                log.error("the usage log %s is corrupt (%s); it is now %s, and a new one begins", self.path, error, corrupt.move_aside(self.path))
                return work(self._open())

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=5, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                _upgrade(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _upgrade(connection: sqlite3.Connection) -> None:
    """Bring a file to this version, once, whichever process comes first.

    Raises:
        LaterVersion: for a file that a later Easel has written.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(_ADDED):
        raise LaterVersion(f"The usage log's version is {version}, and this Easel knows {len(_ADDED)}: use the Easel that wrote it, or another usage.path")
    connection.executescript(_SCHEMA)
    if version == len(_ADDED):
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in _ADDED[connection.execute("PRAGMA user_version").fetchone()[0] :]:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(_ADDED)}")
