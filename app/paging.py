"""Pages that cost the same wherever they lie: a range of the primary key, never an OFFSET, never a count."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, Select, select, union
from sqlalchemy.orm import Session

from app.errors import FieldProblem, Problem

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page(Generic[Row]):
    items: Sequence[Row]
    next: str | None


def encode_cursor(identifier: UUID) -> str:
    return base64.urlsafe_b64encode(identifier.bytes).decode().rstrip("=")


def decode_cursor(text: str) -> UUID:
    """Problem 422 for what we did not hand out."""
    try:
        return UUID(bytes=base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        detail = "This is not the `next` of an earlier page."
        raise Problem(422, "invalid-request", detail, errors=[FieldProblem("cursor", detail, name="next")]) from None


def page(
    session: Session,
    model: Any,
    *,
    limit: int,
    cursor: str | None,
    branches: Sequence[Sequence[ColumnElement[bool]]] = ((),),
    newest_first: bool = False,
    options: Sequence[Any] = (),
) -> Page[Any]:
    """Rows that satisfy any branch, in the order of their ids.

    Every branch is an indexed range of its own, cut at the limit before they are merged: the cost does not grow with
    the table, nor with what other users own (an OR over them would walk the whole key).
    """
    order = model.id.desc() if newest_first else model.id
    after: list[ColumnElement[bool]] = []
    if cursor is not None:
        last = decode_cursor(cursor)
        after = [model.id < last if newest_first else model.id > last]
    cut = [select(model.id).where(*branch, *after).order_by(order).limit(limit + 1) for branch in branches]
    ids = session.scalars(_merged(cut, newest_first, limit + 1)).all()
    shown = ids[:limit]
    rows = session.scalars(select(model).where(model.id.in_(shown)).order_by(order).options(*options)).all()
    return Page(rows, encode_cursor(shown[-1]) if len(ids) > limit else None)


def _merged(cut: Sequence[Select[Any]], newest_first: bool, limit: int) -> Any:
    if len(cut) == 1:
        return cut[0]
    merged = union(*(select(part.subquery().c.id) for part in cut)).subquery()
    return select(merged.c.id).order_by(merged.c.id.desc() if newest_first else merged.c.id).limit(limit)
