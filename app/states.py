"""Which states there are, and the only ways from one to another.

A transition is one conditional UPDATE; nobody reads a state and then writes it. No row changed means that somebody
else was first, or that the state does not allow it: a conflict, never an overwrite.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, update
from sqlalchemy.orm import Session

from app.db import change
from app.models import Attachment, Operation, Snapshot, Volume

Stateful = type[Volume] | type[Snapshot] | type[Attachment] | type[Operation]

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
    *conditions: ColumnElement[bool],
    only_from: Iterable[str] | None = None,
    **values: Any,
) -> bool:
    """Move one row to state `to` if its state (and `conditions`) allow it; True when this call did it."""
    sources = TRANSITIONS[model][to]
    allowed = sources if only_from is None else tuple(s for s in sources if s in set(only_from))
    if model in (Volume, Snapshot):
        values.setdefault("version", model.version + 1)
        values.setdefault("updated_at", now())
    statement = (
        update(model).where(model.id == identifier, model.state.in_(allowed), *conditions).values(state=to, **values)
    )
    return change(session, statement) == 1
