"""The usage log: which key had how many pictures made, with which model, LoRAs and embeddings.

Append-only tables in an SQLite file, or in a PostgreSQL that several entries share (`usage.store`), written after each answer
and read by GET /admin/usage and by the quotas. Keys stand in it by their hash, prompts do not. Failing to write is logged and
never fails a request; a file that is corrupt is moved aside and a new one begun. An older version's log is brought to this one,
a newer one's is left alone: neither written nor read.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar, get_args

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    func,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from core import database
from core.database import Schema
from core.generation import Generation
from core.plans import Plan
from core.settings import Usage

log = logging.getLogger("easel.usage")
T = TypeVar("T")
Group = Literal["key", "model", "lora", "day", "commercial"]
GROUPS: tuple[Group, ...] = get_args(Group)
ERRORS = (SQLAlchemyError, OSError)  # what a log that cannot be used raises

# One row a request, and one for each LoRA of it.
_META = MetaData()
_USAGE = Table(
    "usage",
    _META,
    Column("id", Integer, primary_key=True),
    Column("at", Float(53), nullable=False),
    Column("key", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("pictures", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("commercial", Boolean, nullable=False),
    Column("commercial_use", Boolean, nullable=False),
    Column("credit", Text, nullable=False),
    Column("flagged", Integer, nullable=False, server_default=text("0")),
    Index("usage_at", "at"),
    Index("usage_key", "key", "at"),
)
_LORAS = Table(
    "usage_loras",
    _META,
    Column("usage", Integer, ForeignKey("usage.id"), nullable=False),
    Column("lora", Text, nullable=False),
    Column("weight", Float(53), nullable=False),
    Column("sha256", String(64), nullable=False),
    Index("usage_loras_usage", "usage"),
)
_ADDED = ["ALTER TABLE usage ADD COLUMN flagged INTEGER NOT NULL DEFAULT 0", "CREATE INDEX usage_key ON usage (key, at)"]
# What keeps what was written. SQLite's own version tells Easels from before there was a table for it.
_KEPT = {
    "sqlite": [
        *(
            f"CREATE TRIGGER IF NOT EXISTS {table}_{name} BEFORE {what} ON {table} BEGIN SELECT RAISE(ABORT, 'append-only'); END"
            for table in ("usage", "usage_loras")
            for name, what in (("kept", "DELETE"), ("unchanged", "UPDATE"))
        ),
        f"PRAGMA user_version = {len(_ADDED)}",
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION usage_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'append-only'; END $$",
        *(
            f"CREATE OR REPLACE TRIGGER {table}_kept BEFORE DELETE OR UPDATE OR TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION usage_append_only()"
            for table in ("usage", "usage_loras")
        ),
    ],
}


def _before(connection: Connection) -> int | None:
    version = int(connection.execute(text("PRAGMA user_version")).scalar_one()) if connection.dialect.name == "sqlite" else 0
    return version if version or inspect(connection).has_table(_USAGE.name) else None


SCHEMA = Schema("usage", "the usage log", "usage.path or usage.store", _META, first=0, added=_ADDED, before=_before, kept=_KEPT)


@dataclass(frozen=True)
class Line:
    """A line of a report. `group` has a value for each of the asked groups (None: no LoRA);
    `picture_steps` is the sum of pictures times steps, `flagged` of the pictures that the safety checker replaced."""

    group: dict[Group, str | None]
    requests: int
    pictures: int
    picture_steps: int
    flagged: int = 0


def address(settings: Usage) -> URL | None:
    """Where the settings have the log; None for none."""
    return make_url(settings.store) if settings.store else database.in_file(settings.path) if settings.path else None


class Ledger:
    """The log at an address of SQLAlchemy's. Every process that answers requests may have one of the same."""

    def __init__(self, store: str | URL) -> None:
        self.url = make_url(store)
        self.file = database.file_of(self.url)
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    def append(self, plan: Plan, generation: Generation) -> None:
        """Write down what was drawn; whatever goes wrong is logged, not raised."""
        ran = generation.ran
        if ran is None:
            return
        row = {
            "at": time.time(), "key": plan.client, "model": ran.model_id, "pictures": len(generation.pictures), "width": ran.width, "height": ran.height, "steps": ran.steps_run,
            "commercial": plan.commercial, "commercial_use": ran.commercial_use, "credit": json.dumps(ran.credit, ensure_ascii=False), "flagged": len(ran.flagged or []),
        }  # fmt: skip
        parts = [(x.name, x.weight, x.sha256) for x in ran.loras] + [(x.name, 1.0, x.sha256) for x in ran.embeddings]

        def write(connection: Connection) -> None:
            added = connection.execute(insert(_USAGE).values(**row).returning(_USAGE.c.id)).scalar_one()
            if parts:
                connection.execute(insert(_LORAS), [{"usage": added, "lora": name, "weight": weight, "sha256": sha256} for name, weight, sha256 in parts])

        try:
            self._use(write)
        except ERRORS as error:
            log.error("a request of %s pictures is not in the usage log %s: %s", len(generation.pictures), self, error)

    def report(self, since: datetime | None, until: datetime | None, groups: list[Group]) -> list[Line]:
        """What was drawn from `since` on and before `until`, summed by `groups`, most pictures first.
        By LoRA, a request with two counts for both.

        Raises:
            SQLAlchemyError, OSError: where the log cannot be read.
        """
        columns = [self._column(group) for group in groups]
        sums = [func.coalesce(func.sum(what), 0) for what in (_USAGE.c.pictures, _USAGE.c.pictures * _USAGE.c.steps, _USAGE.c.flagged)]
        query: Select[Any] = select(*columns, func.count(), *sums)
        query = query.select_from(_USAGE.outerjoin(_LORAS, _LORAS.c.usage == _USAGE.c.id) if "lora" in groups else _USAGE)
        if since:
            query = query.where(_USAGE.c.at >= since.timestamp())
        if until:
            query = query.where(_USAGE.c.at < until.timestamp())
        if columns:
            query = query.group_by(*columns).order_by(func.sum(_USAGE.c.pictures).desc(), *columns)

        def shown(group: Group, value: Any) -> str | None:
            return str(bool(value)).lower() if group == "commercial" else value

        size = len(groups)
        rows = self._use(lambda connection: connection.execute(query).all())
        return [Line({g: shown(g, v) for g, v in zip(groups, row[:size], strict=True)}, *map(int, row[size:])) for row in rows]

    def pictures_since(self, since: datetime, key: str) -> int:
        """How many pictures a key has had made; raises as `report`."""
        query = select(func.coalesce(func.sum(_USAGE.c.pictures), 0)).where(_USAGE.c.key == key, _USAGE.c.at >= since.timestamp())
        return int(self._use(lambda connection: connection.execute(query).scalar_one()))

    def close(self) -> None:
        with self._lock:
            self._close()

    def __str__(self) -> str:
        return str(self.file or self.url.render_as_string(hide_password=True))

    def _column(self, group: Group) -> ColumnElement[Any]:
        at = _USAGE.c.at
        day = func.date(at, "unixepoch") if self.file else func.to_char(func.timezone("UTC", func.to_timestamp(at)), "YYYY-MM-DD")
        columns: dict[Group, ColumnElement[Any]] = {"key": _USAGE.c.key, "model": _USAGE.c.model, "lora": _LORAS.c.lora, "day": day.label("day"), "commercial": _USAGE.c.commercial}
        return columns[group]

    def _use(self, work: Callable[[Connection], T]) -> T:
        """`work` on the open log; once more on a new file where it is corrupt or was taken away."""
        engine = self._opened()
        try:
            with engine.begin() as connection:
                return work(connection)
        except DatabaseError as error:
            if not self.file or not database.is_corrupt(error.orig):
                raise
            with self._lock:
                if self._engine is engine:  # no other thread has seen it before
                    self._close()
                    log.error("the usage log %s is corrupt (%s); it is now %s, and a new one begins", self, error.orig, database.move_aside(self.file))
        with self._opened().begin() as connection:
            return work(connection)

    def _opened(self) -> Engine:
        with self._lock:
            if self.file and not self.file.exists():
                self._close()
            if self._engine is None:
                self._engine = SCHEMA.open(self.url)
            return self._engine

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
