"""Which states there are, and the only ways from one to another.

A transition is one conditional UPDATE; nobody reads a state and then writes it. No row changed means that somebody
else was first, or that the state does not allow it: a conflict, never an overwrite.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Update, bindparam, update
from sqlalchemy.orm import Session

from app.db import change
from app.models import Attachment, Image, Operation, Snapshot, Volume

Stateful = type[Volume] | type[Snapshot] | type[Attachment] | type[Operation] | type[Image]

#: state → the states it may be entered from
TRANSITIONS: dict[Stateful, dict[str, tuple[str, ...]]] = {
    Volume: {
        "available": ("creating", "in-use", "reverting", "error"),
        "in-use": ("available", "in-use", "error"),
        "reverting": ("available",),
        "deleting": ("available", "error"),
        "error": ("creating", "available", "in-use", "reverting", "deleting", "error"),
    },
    Snapshot: {
        "available": ("creating", "error"),
        "deleting": ("available", "error"),
        "error": ("creating", "deleting", "available", "error"),
    },
    Attachment: {
        "attached": ("attaching",),
        "detaching": ("attaching", "attached", "error"),
        "detached": ("detaching",),
        "error": ("attaching", "attached"),
    },
    Image: {
        "fetching": ("receiving", "available", "error"),
        "available": ("fetching",),
        "deleting": ("receiving", "available", "error"),
        "error": ("fetching", "available", "deleting", "error"),
    },
    Operation: {
        "running": ("queued", "running"),
        "queued": ("running",),
        "succeeded": ("running",),
        "failed": ("running",),
        "cancelled": ("queued", "running"),
    },
}


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def transition(
    session: Session,
    model: Stateful,
    identifier: UUID,
    to: str,
    /,
    *conditions: ColumnElement[bool],
    only_from: Iterable[str] | None = None,
    **values: Any,
) -> bool:
    """Move one row to state `to` if its state (and `conditions`) allow it; True when this call did it."""
    sources = TRANSITIONS[model][to]
    allowed = sources if only_from is None else tuple(s for s in sources if s in set(only_from))
    if model in (Volume, Snapshot, Image):
        values.setdefault("updated_at", now())
    statement = _transition(model, to, allowed, tuple(values))
    if conditions:
        statement = statement.where(*conditions)
    bound = {f"new_{name}": value for name, value in values.items()}
    return change(session, statement, {"the_id": identifier, **bound}) == 1


@cache
def _transition(model: Stateful, to: str, allowed: tuple[str, ...], names: tuple[str, ...]) -> Update:
    """The statement, put together once: that costs more than running it."""
    table = model.metadata.tables[model.__tablename__]
    new: dict[str, Any] = {name: bindparam(f"new_{name}", type_=table.c[name].type) for name in names}
    if "version" in table.c:
        new["version"] = table.c.version + 1
    condition = (table.c.id == bindparam("the_id", type_=table.c.id.type), table.c.state.in_(allowed))
    return update(table).where(*condition).values(state=to, **new)
