"""What the tests of the API share: problems looked at closely, and the database before and after."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from uuid import UUID

import requests

from tests.support.service import RunningService

MIB = 1 << 20
NOWHERE = "01890000-0000-7000-8000-000000000000"
#: What a running service changes by itself, request or no request.
BACKGROUND = {
    "workers": None,
    "pools": {"free", "allocated", "alarm", "updated_at", "size", "low_space"},
    "image_caches": {"free", "allocated", "alarm", "updated_at", "size"},
    "events": {"sequence", "previous", "hash"},
}


def problem(answer: requests.Response, status: int, code: str, place: str | None = None) -> dict[str, Any]:
    """The problem document, if it is the one expected and well-formed (RFC 9457). `place`: a pointer or a name."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    document: dict[str, Any] = answer.json()
    assert document["code"] == code, document
    assert document["status"] == status
    assert document["type"] == f"urn:stratus:problem:{code}"
    assert document["title"]
    assert document["detail"]
    if place is not None:
        assert place in [error.get("pointer", error.get("name")) for error in document["errors"]], document
    return document


def query(service: RunningService, statement: str, *values: Any) -> list[Any]:
    """Rows of the service's own database, read beside it."""
    with closing(sqlite3.connect(f"file:{service.home}/stratus.db?mode=ro", uri=True, timeout=15)) as database:
        database.row_factory = sqlite3.Row
        return database.execute(statement, values).fetchall()


def dump(service: RunningService) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, without what the service changes by itself."""
    found = {}
    for (table,) in query(service, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"):
        hidden = BACKGROUND.get(table, set())
        if hidden is not None:
            rows = query(service, f"SELECT * FROM {table}")
            found[table] = sorted(tuple(repr(r[c]) for c in r.keys() if c not in hidden) for r in rows)  # noqa: SIM118
    return found


@contextmanager
def unchanged(service: RunningService) -> Iterator[None]:
    """Nothing in the database is other than before, not even an event more."""
    before = dump(service)
    yield
    after = dump(service)
    for table, rows in before.items():
        assert after[table] == rows, table


def events(service: RunningService, resource: str) -> list[sqlite3.Row]:
    """The events of a resource, the oldest first."""
    return query(service, "SELECT * FROM events WHERE resource_id = ? ORDER BY id", UUID(resource).hex)


def initiator(name: str) -> str:
    return f"iqn.2026-11.org.example:{name}"
