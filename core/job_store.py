"""Where jobs are kept: a table in SQLite, or in a PostgreSQL that several entries share (`jobs.store`).

A process claims a job by a lease that it renews while it works on it; the job of a process that died is claimed by
another once its lease is over. Every call is one short transaction, made to be run in a worker thread. Beside the jobs it has the
places of requests that somebody waits for, so that every entry knows how much a key has in the making (core.quotas).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    case,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from ulid import ULID

from core.database import Schema
from core.generation import Generation
from core.jobs import ACTIVE, Job, Status, pack, unpack_generation, unpack_plan
from core.model_settings import Queue
from core.plans import Plan
from core.problems import ProblemDetails, problem
from core.settings import Jobs

KEY_S = 24 * 3600  # how long an idempotency key is known
GONE_S = 7 * 24 * 3600  # how long an expired job is known to have been
_META = MetaData()
_JOBS = Table(
    "jobs",
    _META,
    Column("id", String(40), primary_key=True),
    Column("client", String(64), nullable=False),
    Column("task", String(40), nullable=False),
    Column("service", String(40), nullable=False),
    Column("status", String(12), nullable=False),
    Column("version", Integer, nullable=False, default=1),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("completed_at", Float(53)),
    Column("expires_at", Float(53)),
    Column("position", Integer),
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer),
    Column("pictures", Integer, nullable=False),
    Column("outputs", JSON, nullable=False, default=list),
    Column("error", JSON(none_as_null=True)),
    # What was asked, and what came of it.
    Column("wanted", Text, nullable=False),
    Column("accept", Text, nullable=False),
    Column("plan", LargeBinary),
    Column("generation", LargeBinary),
    Column("preview", LargeBinary),
    Column("preview_step", Integer),
    Column("watched_until", Float(53), nullable=False, default=0),
    # Who works on it.
    Column("owner", String(40)),
    Column("lease_until", Float(53), nullable=False, default=0),
    Column("not_before", Float(53), nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("webhook_url", Text),
    Column("idempotency_key", String(255)),
    Column("digest", String(64)),
    UniqueConstraint("client", "idempotency_key"),
    Index("jobs_status", "status", "id"),
    Index("jobs_client", "client", "id"),
)
# Requests that somebody waits for, of keys whose generations at once or pictures a day are counted.
_PLACES = Table(
    "places",
    _META,
    Column("id", String(40), primary_key=True),
    Column("client", String(64), nullable=False, index=True),
    Column("pictures", Integer, nullable=False),
    Column("owner", String(40), nullable=False),
    Column("lease_until", Float(53), nullable=False),
)
SCHEMA = Schema(
    "jobs", "the store of jobs", "jobs.store", _META, first=1, added=[],
    before=lambda connection: 1 if inspect(connection).has_table(_JOBS.name) else None,
)  # fmt: skip
_SHOWN = [_JOBS.c[f.name] for f in fields(Job)]


class Store:
    """The jobs of one database, for this process, which `owner` names.

    Args:
        settings: where it is, and how long results and leases last.

    Raises:
        LaterVersion: where a later Easel has written it.
    """

    def __init__(self, settings: Jobs) -> None:
        self.settings, self.owner = settings, str(ULID())
        self._engine = SCHEMA.open(settings.store)

    def close(self) -> None:
        self._engine.dispose()

    # What callers ask.

    def add(self, task: str, service: str, plan: Plan, wanted: str, accept: str, queue: Queue, webhook_url: str | None = None, key: str | None = None, digest: str | None = None) -> Job | None:
        """A new job; None where one of the client's has its idempotency key meanwhile.

        Raises:
            Problem: 429 where as many wait as may, in all or of the client.
        """
        now = time.time()
        values: dict[str, Any] = {
            "id": f"job_{ULID()}", "client": plan.client, "task": task, "service": service, "status": "queued", "created_at": now, "pictures": plan.rows,
            "wanted": wanted, "accept": accept, "plan": pack(plan), "webhook_url": webhook_url, "idempotency_key": key, "digest": digest,
        }  # fmt: skip
        with self._engine.begin() as connection:
            waits = and_(_JOBS.c.status == "queued", _JOBS.c.service == service)
            waiting, own = connection.execute(select(func.count(), func.coalesce(func.sum(case((_JOBS.c.client == plan.client, 1), else_=0)), 0)).where(waits)).one()
            if waiting >= queue.limit or own >= queue.per_key:
                whose = "queue is" if waiting >= queue.limit else "key's share of the queue is"
                raise problem(429, "queue-full", "Too many requests", f"The {whose} full ({waiting} jobs wait). Try again later.", retry_after=5)
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(_JOBS).values(**values))
        except IntegrityError:
            return None
        return self.find(values["id"])

    def find(self, id: str) -> Job | None:
        return self._one(select(*_SHOWN).where(_JOBS.c.id == id))

    def of_key(self, client: str, key: str) -> Job | None:
        """The job that was submitted with an idempotency key."""
        fresh = _JOBS.c.created_at > time.time() - KEY_S
        return self._one(select(*_SHOWN).where(_JOBS.c.client == client, _JOBS.c.idempotency_key == key, fresh))

    def newest(self, client: str | None, status: Status | None, after: str | None, limit: int) -> list[Job]:
        """The newest jobs, of one client or of all, older than `after`."""
        query = select(*_SHOWN).order_by(_JOBS.c.id.desc()).limit(limit)
        for wanted, column in ((client, _JOBS.c.client), (status, _JOBS.c.status)):
            query = query if wanted is None else query.where(column == wanted)
        return self._all(query if after is None else query.where(_JOBS.c.id < after))

    def ahead(self, job: Job) -> int:
        """How many jobs wait that came before this one."""
        with self._engine.begin() as connection:
            before = and_(_JOBS.c.status == "queued", _JOBS.c.service == job.service, _JOBS.c.id < job.id)
            return int(connection.execute(select(func.count()).where(before)).scalar_one())

    # What a client has in the making, jobs and requests that it waits for, at any entry.

    def take(self, client: str, pictures: int) -> tuple[str, int, int]:
        """A place for a request, until it is given back or this process dies: its id, how many generations of the client
        wait or run with it, and how many pictures they will make. One after another, so that each sees those before it."""
        now, place = time.time(), str(ULID())
        jobs = select(_JOBS.c.pictures).where(_JOBS.c.client == client, _JOBS.c.status.in_(ACTIVE))
        places = select(_PLACES.c.pictures).where(_PLACES.c.client == client, _PLACES.c.lease_until > now)
        both = jobs.union_all(places).subquery()
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(client))))
            connection.execute(insert(_PLACES).values(id=place, client=client, pictures=pictures, owner=self.owner, lease_until=now + self.settings.lease_s))
            count, coming = connection.execute(select(func.count(), func.coalesce(func.sum(both.c.pictures), 0))).one()
        return place, int(count), int(coming)

    def give_back(self, place: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(_PLACES).where(_PLACES.c.id == place))

    def cancel(self, id: str) -> Job | None:
        """Cancel a job: at once where nobody works on it."""
        now = time.time()
        free = and_(_JOBS.c.id == id, _JOBS.c.status == "queued", _JOBS.c.owner.is_(None))
        if job := self._change(free, status="canceled", completed_at=now, expires_at=now + self.settings.retention_s):
            return job
        return self._change(and_(_JOBS.c.id == id, _JOBS.c.status.in_(("queued", "running"))), status="canceling") or self.find(id)

    def watch(self, id: str, seconds: float) -> None:
        """Have previews made for so long."""
        with self._engine.begin() as connection:
            connection.execute(update(_JOBS).where(_JOBS.c.id == id).values(watched_until=time.time() + seconds))

    def preview(self, id: str) -> bytes | None:
        return self._blob(id, "preview")

    def result(self, id: str) -> tuple[str, str, Generation] | None:
        """The request (JSON), what its client accepts, and what came of it; None where that is not there."""
        with self._engine.begin() as connection:
            row = connection.execute(select(_JOBS.c.wanted, _JOBS.c.accept, _JOBS.c.generation).where(_JOBS.c.id == id)).one_or_none()
        return (row.wanted, row.accept, unpack_generation(row.generation)) if row and row.generation else None

    # What those who do them ask.

    def claim(self, services: Sequence[str], most: int) -> list[Job]:
        """Take up to so many jobs that wait, of the clients that have the fewest taken; then of the oldest."""
        now, others = time.time(), _JOBS.alias()
        taken = select(func.count()).where(others.c.client == _JOBS.c.client, others.c.owner.is_not(None)).scalar_subquery()
        free = (
            select(_JOBS.c.id)
            .where(_JOBS.c.status == "queued", _JOBS.c.owner.is_(None), _JOBS.c.not_before <= now, _JOBS.c.service.in_(services))
            .order_by(taken, _JOBS.c.id)
            .limit(most)
            .with_for_update(skip_locked=True)
        )
        return self._changed(_JOBS.c.id.in_(free), owner=self.owner, lease_until=now + self.settings.lease_s, attempts=_JOBS.c.attempts + 1, position=None)

    def work(self, id: str) -> tuple[Plan, str, str]:
        """A job's plan, its request (JSON), and what its client accepts."""
        with self._engine.begin() as connection:
            row = connection.execute(select(_JOBS.c.plan, _JOBS.c.wanted, _JOBS.c.accept).where(_JOBS.c.id == id)).one()
        return unpack_plan(row.plan), row.wanted, row.accept

    def beat(self, ids: Sequence[str]) -> None:
        """Renew this process's places, and its leases of the jobs that it works on. One whose end could not be put down is claimed again when its lease is over."""
        until = time.time() + self.settings.lease_s
        with self._engine.begin() as connection:
            connection.execute(update(_JOBS).where(_JOBS.c.owner == self.owner, _JOBS.c.id.in_(ids)).values(lease_until=until))
            connection.execute(update(_PLACES).where(_PLACES.c.owner == self.owner).values(lease_until=until))

    def mine(self, id: str) -> Job | None:
        """A job that this process works on; None where it does not, or no longer."""
        return self._one(select(*_SHOWN).where(_JOBS.c.id == id, _JOBS.c.owner == self.owner))

    def tell(self, id: str, **values: Any) -> Job | None:
        """Put down how a job of this process's is (position, step, steps, preview); with `started_at`, that it runs."""
        if "started_at" in values:
            values["status"] = case((_JOBS.c.status == "queued", "running"), else_=_JOBS.c.status)
        return self._change(and_(_JOBS.c.id == id, _JOBS.c.owner == self.owner), **values)

    def finish(self, id: str, status: Status, generation: Generation | None = None, outputs: list[list[Any]] | None = None, error: ProblemDetails | None = None) -> Job | None:
        """Put down what came of a job of this process's; None where it is no longer this process's."""
        now = time.time()
        values: dict[str, Any] = {
            "status": status, "completed_at": now, "expires_at": now + self.settings.retention_s, "owner": None, "plan": None, "preview": None,
            "started_at": func.coalesce(_JOBS.c.started_at, now), "outputs": outputs or [], "error": error.model_dump(mode="json") if error else None,
            "generation": pack(generation) if generation else None,
        }  # fmt: skip
        return self._change(and_(_JOBS.c.id == id, _JOBS.c.owner == self.owner), **values)

    def release(self, id: str, wait_s: float = 0, attempted: bool = True) -> None:
        """Give a job of this process's back, to be claimed again (by anyone) after a while."""
        values = self._again() | {"not_before": time.time() + wait_s}
        self._change(and_(_JOBS.c.id == id, _JOBS.c.owner == self.owner), **values, attempts=_JOBS.c.attempts - (0 if attempted else 1))

    def sweep(self) -> list[Job]:
        """Give back the jobs of processes that died, end those that were tried too often or are to be canceled (they are
        returned), and forget what is too old."""
        now = time.time()
        lost = and_(_JOBS.c.status.in_(ACTIVE), _JOBS.c.owner.is_not(None), _JOBS.c.lease_until < now)
        over = {"completed_at": now, "expires_at": now + self.settings.retention_s, "owner": None, "plan": None, "preview": None}
        detail = f"The server died {self.settings.attempts} times while it worked on this; it is not tried again."
        error = problem(500, "job-lost", "Job lost", detail).details.model_dump(mode="json")
        ended = self._changed(and_(lost, _JOBS.c.status == "canceling"), status="canceled", **over)
        ended += self._changed(and_(lost, _JOBS.c.attempts >= self.settings.attempts), status="failed", error=error, **over)
        self._changed(lost, **self._again())
        self._changed(and_(_JOBS.c.status.in_(("succeeded", "failed", "canceled")), _JOBS.c.expires_at < now), status="expired", generation=None, wanted="", outputs=[])
        with self._engine.begin() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.status == "expired", _JOBS.c.expires_at < now - GONE_S))
            known = and_(_JOBS.c.idempotency_key.is_not(None), _JOBS.c.created_at < now - KEY_S)
            connection.execute(update(_JOBS).where(known).values(idempotency_key=None))
            connection.execute(delete(_PLACES).where(_PLACES.c.lease_until < now))
        return ended

    @staticmethod
    def _again() -> dict[str, Any]:
        canceling = _JOBS.c.status == "canceling"
        return {"status": case((canceling, "canceling"), else_="queued"), "owner": None, "started_at": None, "step": 0, "position": None, "preview": None, "preview_step": None}

    def _change(self, which: Any, **values: Any) -> Job | None:
        return next(iter(self._changed(which, **values)), None)

    def _changed(self, which: Any, **values: Any) -> list[Job]:
        with self._engine.begin() as connection:
            rows = connection.execute(update(_JOBS).where(which).values(version=_JOBS.c.version + 1, **values).returning(*_SHOWN))
            return [Job(**row._mapping) for row in rows]

    def _one(self, query: Select[Any]) -> Job | None:
        return next(iter(self._all(query)), None)

    def _all(self, query: Select[Any]) -> list[Job]:
        with self._engine.begin() as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def _blob(self, id: str, name: str) -> bytes | None:
        with self._engine.begin() as connection:
            return connection.execute(select(_JOBS.c[name]).where(_JOBS.c.id == id)).scalar_one_or_none()
