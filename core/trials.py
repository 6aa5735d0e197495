"""What happened in experiments, in an SQLite file: definitions, who was assigned what, and outcomes.

Subjects stand in it by a hash. core.catalogue reads definitions while it plans, api.backend writes
assignments, api.experiments the rest; every process may have the file open.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel

from core.experiments import Definition, Metric, applied, stopped
from core.plans import Assigned
from core.problems import invalid_field, nearest, problem, unavailable
from core.requests import GenerationRequest
from core.settings import Settings, beside_configuration
from core.versions import LaterVersion

log = logging.getLogger("easel.experiments")
T = TypeVar("T")
Recorded = Literal["new", "same", "replaced"]
VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS experiments (
    id TEXT PRIMARY KEY, definition TEXT NOT NULL, created_at REAL NOT NULL, stopped_at REAL, kept TEXT);
CREATE TABLE IF NOT EXISTS assignments (
    experiment TEXT NOT NULL, subject TEXT NOT NULL, variant TEXT NOT NULL, first_at REAL NOT NULL, requests INTEGER NOT NULL,
    PRIMARY KEY (experiment, subject)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcomes (
    experiment TEXT NOT NULL, subject TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (experiment, subject, metric)) WITHOUT ROWID;
"""


class Experiment(BaseModel):
    """An experiment and how it stands; times are seconds since 1970. `kept`: the variant that everyone gets after the stop."""

    definition: Definition
    created_at: float
    stopped_at: float | None
    kept: str | None


class Counts(BaseModel):
    """A variant's subjects and their requests."""

    subjects: int = 0
    requests: int = 0


class Trials:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def create(self, definition: Definition) -> Experiment:
        """Raises: Problem: 409 where the id is taken; as `find`."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO experiments VALUES (?, ?, ?, NULL, NULL)", (definition.id, definition.model_dump_json(), time.time()))

        try:
            self._use(write)
        except sqlite3.IntegrityError:
            raise problem(409, "experiment-exists", "It exists", f"There is an experiment {definition.id} already; one is not changed, since its results would mix.") from None
        return self.find(definition.id)

    def all(self) -> list[Experiment]:
        """Every experiment, the latest first."""
        rows = self._use(lambda c: c.execute("SELECT definition, created_at, stopped_at, kept FROM experiments ORDER BY created_at DESC").fetchall())
        return [_experiment(row) for row in rows]

    def find(self, id: str) -> Experiment:
        """One experiment.

        Raises:
            Problem: 404 where there is none; 503 where the file cannot be used.
        """
        if (found := self._get(id)) is None:
            raise problem(404, "no-such-experiment", "No such experiment", f"There is no experiment {id[:80]!r}.")
        return found

    def _get(self, id: str) -> Experiment | None:
        row = self._use(lambda c: c.execute("SELECT definition, created_at, stopped_at, kept FROM experiments WHERE id = ?", (id,)).fetchone())
        return _experiment(row) if row else None

    def stop(self, id: str, keep: str | None) -> Experiment:
        """End the assigning; again with another `keep` changes that alone.

        Raises:
            Problem: 422 where `keep` is no variant; as `find`.
        """
        names = [v.name for v in self.find(id).definition.variants]
        if keep is not None and keep not in names:
            raise invalid_field("keep", f"there is no variant {keep[:80]!r}{nearest(keep, names)}", names, keep)
        self._use(lambda c: c.execute("UPDATE experiments SET stopped_at = COALESCE(stopped_at, ?), kept = ? WHERE id = ?", (time.time(), keep, id)))
        return self.find(id)

    def applied(self, request: GenerationRequest, client: str) -> tuple[GenerationRequest, Assigned]:
        """The request as its experiment has it.

        Raises:
            Problem: 409 where the experiment was stopped and keeps no variant; 422 for an unknown one or a
                field that it sets; as `find`.
        """
        id = request.experiment or ""
        found = self._get(id)
        if found is None:
            raise invalid_field("experiment", "there is no such experiment", "the id of an experiment", id)
        if found.stopped_at is not None and found.kept is None:
            raise stopped(id)
        return applied(request, found.definition, client, found.kept, found.stopped_at is None)

    def count(self, assigned: Assigned) -> None:
        """Write a request down; whatever goes wrong is logged and fails no picture."""
        row = (assigned.experiment, assigned.subject, assigned.variant, time.time())
        try:
            self._use(lambda c: c.execute("INSERT INTO assignments VALUES (?, ?, ?, ?, 1) ON CONFLICT DO UPDATE SET requests = requests + 1", row))
        except Exception as error:
            log.error("a request of the experiment %s is not counted: %s", assigned.experiment, error)

    def report(self, id: str, subject: str, metric: str, value: float) -> Recorded:
        """Take an outcome: one for each subject and metric, the latest.

        Raises:
            Problem: 409 where the subject has had no variant; 503 where the file cannot be used.
        """

        def write(connection: sqlite3.Connection) -> Recorded | None:
            key = (id, subject)
            if not connection.execute("SELECT 1 FROM assignments WHERE experiment = ? AND subject = ?", key).fetchone():
                return None
            before = connection.execute("SELECT value FROM outcomes WHERE experiment = ? AND subject = ? AND metric = ?", (*key, metric)).fetchone()
            connection.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?, ?)", (*key, metric, value, time.time()))
            return "new" if before is None else "same" if before[0] == value else "replaced"

        recorded = self._use(write)
        if recorded is None:
            raise problem(409, "not-assigned", "Not assigned", f"This subject has asked for no picture of the experiment {id}, so that it has no variant.")
        return recorded

    def counts(self, definition: Definition) -> dict[str, Counts]:
        """By the variants' names, in their order."""
        rows = self._use(lambda c: c.execute("SELECT variant, COUNT(*), SUM(requests) FROM assignments WHERE experiment = ? GROUP BY variant", (definition.id,)).fetchall())
        found = {name: Counts(subjects=subjects, requests=requests) for name, subjects, requests in rows}
        return {v.name: found.get(v.name, Counts()) for v in definition.variants}

    def values(self, definition: Definition, metric: Metric) -> dict[str, list[float]]:
        """A metric's values by the variants' names; of those who reported none, 0 where that is what it means."""
        query = "SELECT a.variant, o.value FROM assignments a LEFT JOIN outcomes o ON o.experiment = a.experiment AND o.subject = a.subject AND o.metric = ? WHERE a.experiment = ?"
        found: dict[str, list[float]] = {v.name: [] for v in definition.variants}
        for variant, value in self._use(lambda c: c.execute(query, (metric.name, definition.id)).fetchall()):
            if value is not None or metric.missing_is_false:
                found[variant].append(value or 0.0)
        return found

    def _use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` in a transaction.

        Raises:
            sqlite3.IntegrityError: what `work` runs into. Problem: 503 for all else.
        """
        with self._lock:
            try:
                with self._open() as connection:
                    return work(connection)
            except sqlite3.IntegrityError:
                raise
            except (sqlite3.Error, OSError) as error:
                log.error("the experiments in %s cannot be used: %s", self.path, error)
                raise unavailable(f"The file of the experiments cannot be used: {error}.", slug="experiments-unusable") from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=5, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise LaterVersion(f"its version is {version}, and this Easel knows {VERSION}: use the Easel that wrote it, or another experiments.path")
            connection.executescript(f"{_SCHEMA} PRAGMA user_version = {VERSION};")
            self._connection = connection
        return self._connection


def _experiment(row: tuple[str, float, float | None, str | None]) -> Experiment:
    return Experiment(definition=Definition.model_validate_json(row[0]), created_at=row[1], stopped_at=row[2], kept=row[3])


@lru_cache(maxsize=8)
def _at(path: Path) -> Trials:
    return Trials(path)


def configured(settings: Settings) -> Trials:
    """The file that the settings name, opened once a process.

    Raises:
        Problem: 503 where they name none.
    """
    if settings.experiments.path is None:
        raise unavailable("There are no experiments: experiments.path is null in configuration.yaml.", slug="experiments-off")
    return _at(beside_configuration(settings.experiments.path))
