"""What the stores in SQL have in common: their engine, their schema's version, and files that are corrupt.

A store is a file of SQLite or a PostgreSQL that several entries share. Its schema's version stands in a table of one row: that of
an earlier Easel is brought to this one's, a later one's refused. An SQLite file that is corrupt is moved aside, so that a new one
can begin and whoever wants to save the old one has it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from core.settings import beside_configuration
from core.versions import LaterVersion

log = logging.getLogger("easel.database")
_MAKING = 0x6561_7365  # any number that others do not lock
# A server that does not answer is given up: seconds to connect, milliseconds for what was sent.
_PATIENCE = {"connect_timeout": 5, "tcp_user_timeout": 15_000}


def in_file(path: Path) -> URL:
    """The address of an SQLite file."""
    return URL.create("sqlite", database=str(path))


def file_of(url: URL) -> Path | None:
    """The file of an SQLite; relative ones are beside the configuration."""
    return beside_configuration(Path(url.database)) if url.get_backend_name() == "sqlite" and url.database else None


def engine_of(store: str | URL) -> Engine:
    """A pool of connections; none is made yet."""
    url = make_url(store)
    if file := file_of(url):
        engine = create_engine(in_file(file), pool_size=2, connect_args={"timeout": 30})  # further ones are closed after use: a file has one writer
        event.listen(engine, "connect", _pragmas)
        return engine
    return create_engine(url, pool_pre_ping=True, connect_args=_PATIENCE)


def _pragmas(connection: Any, _: object) -> None:
    """Readers and one writer at once, also of several processes; a power cut may cost the last second, no more."""
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {pragma}").close()


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


@dataclass
class Schema:
    """A store's tables and their version.

    Args:
        name: of the table `NAME_schema`, which has the version.
        what: how messages call the store; `setting` says where it is.
        tables: of this version.
        first: the version of stores that none of `added` has changed.
        added: what a store of an earlier version lacks: a statement for each version after the first.
        kept: statements by dialect that are repeated on each start.
        before: the version of a store that has no `NAME_schema`; None where nothing is there.
    """

    name: str
    what: str
    setting: str
    tables: MetaData
    first: int
    added: list[str]
    before: Callable[[Connection], int | None]
    kept: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def _version(self) -> Table:
        return Table(f"{self.name}_schema", MetaData(), Column("id", Integer, primary_key=True), Column("version", Integer, nullable=False))  # one row

    def version(self) -> int:
        return self.first + len(self.added)

    def check(self, store: str | URL) -> None:
        """Look at a store without making or changing anything.

        Raises:
            LaterVersion: where a later Easel has written it. Whatever else is wrong is told when the store is used.
        """
        engine = engine_of(store)
        if (file := file_of(engine.url)) and not file.exists():
            return
        try:
            with engine.connect() as connection:
                self._found(connection)
        except SQLAlchemyError as error:
            log.error("%s cannot be looked at: %s", self.what, error)
        finally:
            engine.dispose()

    def open(self, store: str | URL) -> Engine:
        """A store with its tables, made or brought to this version where they are not yet.

        Raises:
            LaterVersion: as `check`.
        """
        engine = engine_of(store)
        try:
            if file := file_of(engine.url):
                file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with _alone(engine):
                    self._make(engine)
            except DatabaseError as error:
                if file and is_corrupt(error.orig):
                    engine.dispose()
                    log.error("%s %s is corrupt; it is now %s, and a new one begins", self.what, file, move_aside(file))
                elif not isinstance(error, (IntegrityError, OperationalError, ProgrammingError)):
                    raise
                self._make(engine)  # another process was making it at the same time
        except BaseException:
            engine.dispose()
            raise
        return engine

    def _found(self, connection: Connection) -> int | None:
        there = inspect(connection).has_table(self._version.name)
        found = connection.execute(select(self._version.c.version)).scalar_one_or_none() if there else None
        found = self.before(connection) if found is None else found
        if found is not None and found > self.version():
            raise LaterVersion(f"The version of {self.what} is {found}, and this Easel knows {self.version()}: use the Easel that wrote it, or another {self.setting}")
        return found

    def _make(self, engine: Engine) -> None:
        """Once, whichever process comes first."""
        with engine.begin() as connection:
            version = self._found(connection)
        # The version comes before the tables: who sees them without one sees an old store.
        self._version.create(engine, checkfirst=True)
        with contextlib.suppress(IntegrityError), engine.begin() as connection:
            connection.execute(insert(self._version).values(id=1, version=self.version() if version is None else version))
        self.tables.create_all(engine)
        with engine.begin() as connection:
            connection.execute(update(self._version).values(version=self._version.c.version))  # others wait for this transaction
            for statement in self.added[connection.execute(select(self._version.c.version)).scalar_one() - self.first :]:
                connection.execute(text(statement))
            connection.execute(update(self._version).values(version=self.version()))
            for statement in self.kept.get(engine.dialect.name, ()):
                connection.execute(text(statement))


@contextlib.contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """One process at a time, on PostgreSQL, where a table that two are making at once is an error for one of them; SQLite has one writer anyway."""
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection:
        connection.execute(select(func.pg_advisory_xact_lock(_MAKING)))  # until this transaction ends
        yield
