"""Pins: somebody says that they depend on an image's file, or no longer do."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, joinedload

from app import images
from app.auth import Caller
from app.config import Settings
from app.db import change
from app.errors import forbidden, not_found
from app.events import record
from app.holds import hold
from app.models import ImagePin
from app.schemas import PinDocument
from app.states import now


def list_of(session: Session, caller: Caller, identifier: UUID) -> list[ImagePin]:
    """All, for nodes and admins; nobody else pins, and whose machines run from an image is not for everybody."""
    image = images.find(session, caller, identifier)
    _require_node(caller)
    wanted = select(ImagePin).where(ImagePin.image_id == image.id).order_by(ImagePin.name, ImagePin.principal_id)
    return list(session.scalars(wanted.options(joinedload(ImagePin.principal))))


def _require_node(caller: Caller) -> None:
    if not caller.sees_all:
        raise forbidden("nodes-only", "Only nodes and admins pin images.")


def pin(session: Session, settings: Settings, caller: Caller, identifier: UUID, name: str) -> PinDocument:
    """Pin the image under a name, of an instance for a node; repeating it is fine. Only then the path is told."""
    image = images.find(session, caller, identifier)
    _require_node(caller)
    if not hold(session, image.id, "available"):
        raise images.not_available(image)
    session.refresh(image)
    kind = "overlay" if caller.role == "node" else "admin"
    values = {"image_id": image.id, "principal_id": caller.id, "name": name, "kind": kind, "created_at": now()}
    if images.add_once(session, ImagePin(**values)):
        record(session, caller.actor, "image.pin", ("image", image.id), name=name, pin=kind)
    assert image.digest is not None
    path = str(settings.image_path(image.digest))
    return PinDocument.model_validate({"name": name, "kind": kind, "digest": image.digest, "path": path})


def unpin(session: Session, caller: Caller, identifier: UUID, name: str) -> None:
    """End the caller's own pin of that name; an admin ends everybody's."""
    image = images.find(session, caller, identifier)
    _require_node(caller)
    whose = () if caller.is_admin else (ImagePin.principal_id == caller.id,)
    gone = delete(ImagePin).where(ImagePin.image_id == image.id, ImagePin.name == name, *whose)
    if change(session, gone) == 0:
        raise not_found("pin", f"{name} of image {image.id}")
    record(session, caller.actor, "image.unpin", ("image", image.id), name=name)
