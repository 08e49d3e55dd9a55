"""One engine per process, and two kinds of transaction: `read` and `write`.

SQLite: WAL, so readers never wait; a write takes the lock when it begins (BEGIN IMMEDIATE), because a transaction that
reads first and writes later can fail in the middle. PostgreSQL: READ COMMITTED; every decision is a conditional UPDATE.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import CursorResult, Delete, Engine, Update, create_engine, event
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.orm import Session

PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=15000", "foreign_keys=ON", "trusted_schema=OFF")


class Database:
    """`url` is SQLAlchemy's; `connections` bounds how many this process holds at once."""

    def __init__(self, url: str, connections: int = 10) -> None:
        self.engine = _engine(url, connections)
        self._reader = self.engine.execution_options(read_only=True)
        self._relaxed = self.engine.execution_options(relaxed=True)

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent look; nothing it changes is kept."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[Session]:
        """Commits at the end, or rolls back whatever was raised.

        Not `durable`: for what may be forgotten in a power cut (never only in part, never out of order), like a claim
        or a beat; the commit does not wait for the disk.
        """
        engine = self.engine if durable else self._relaxed
        with Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()


def change(session: Session, statement: Update | Delete, values: dict[str, Any] | None = None) -> int:
    """How many rows a conditional UPDATE or DELETE changed: 0 means that its condition did not hold.

    Objects the session has loaded are not touched; `session.refresh` what you go on reading.
    """
    done = session.execute(statement, values, execution_options={"synchronize_session": False})
    assert isinstance(done, CursorResult)
    return done.rowcount


def _engine(url: str, connections: int) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        engine = create_engine(url, pool_size=connections, max_overflow=0, pool_pre_ping=True, hide_parameters=True)
        event.listen(engine, "begin", _begin_postgresql)
        return engine
    engine = create_engine(url, pool_size=connections, max_overflow=0, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # Python 3.11's driver would otherwise open transactions by itself, and only before some statements.
    connection.isolation_level = None
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("read_only"):
        connection.exec_driver_sql("BEGIN")
        return
    connection.exec_driver_sql(f"PRAGMA synchronous={'NORMAL' if options.get('relaxed') else 'FULL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("relaxed"):
        connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
