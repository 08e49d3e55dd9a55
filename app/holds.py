"""What depends on an image's file, so that it is neither evicted nor deleted: pins, and volumes made from it.

Who begins to depend on an image locks its row, finds it available, and writes that down in one transaction. Who takes
an image away locks the same row first and then asks, in the UPDATE itself, whether it is pinned: one of the two sees
the other.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, union_all, update
from sqlalchemy.orm import Session

from app.auth import Caller
from app.db import change
from app.errors import Problem, conflict
from app.models import Image, ImagePin, Volume
from app.states import now, transition


def pinned() -> ColumnElement[bool]:
    """Something depends on the image: a pin, or a volume that was made from it."""
    return or_(exists().where(ImagePin.image_id == Image.id), exists().where(made_from(Image.id)))


def made_from(image_id: Any) -> ColumnElement[bool]:
    """The volumes that were cloned from the image."""
    return and_(Volume.origin_id == image_id, Volume.origin_kind == "image")


def counts(session: Session, identifiers: Collection[UUID]) -> dict[UUID, int]:
    """How much depends on each of the images; none is not told."""
    by_pin = select(ImagePin.image_id.label("image_id")).where(ImagePin.image_id.in_(identifiers))
    by_volume = select(Volume.origin_id).where(Volume.origin_kind == "image", Volume.origin_id.in_(identifiers))
    found = union_all(by_pin, by_volume).subquery()
    rows = session.execute(select(found.c.image_id, func.count()).group_by(found.c.image_id))
    return {row[0]: row[1] for row in rows}


def hold(session: Session, identifier: UUID, *states: str) -> bool:
    """Lock the image's row until the transaction ends, if it is in one of `states`: it is being used, and stays."""
    held = update(Image).where(Image.id == identifier, Image.state.in_(states)).values(used_at=now())
    return change(session, held) == 1


def refusal(session: Session, caller: Caller, image: Image) -> Problem:
    """What pins the image: by name what the caller may see, by number the rest."""
    pins = session.execute(select(ImagePin.kind, ImagePin.name).where(ImagePin.image_id == image.id)).all()
    volumes = session.execute(select(Volume.id, Volume.owner_id).where(made_from(image.id))).all()
    named = [f"{pin.kind} {pin.name}" for pin in pins if caller.sees_all]
    named += [f"volume {volume.id}" for volume in volumes if caller.sees_all or volume.owner_id == caller.id]
    others = len(pins) + len(volumes) - len(named)
    told = named[:10] + ([f"{others} of others"] if others else [])
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    return conflict("image-pinned", f"Image {image.id} is depended on by: {', '.join(told)}{more}.")


def take_away(session: Session, identifier: UUID, *conditions: ColumnElement[bool]) -> bool:
    """Begin to delete the image, unless something depends on it; whether this call did it."""
    session.scalar(select(Image.id).where(Image.id == identifier).with_for_update())
    return transition(session, Image, identifier, "deleting", ~pinned(), *conditions)
