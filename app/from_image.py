"""Volumes from images: `POST /v1/volumes {"image": …}`. The image is fetched if need be; the volume waits for it."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import Session

from app import capacity, holds, images, operations, volumes
from app.auth import Caller
from app.config import Settings
from app.errors import conflict, invalid
from app.events import record
from app.models import Image, Operation
from app.schemas import VolumeCreate


def create(session: Session, settings: Settings, caller: Caller, body: VolumeCreate) -> Operation:
    """Record the volume and the operation that clones it. Its size, where none was named and the image is still to
    come, is 0 until then, and charged then."""
    if body.snapshot is not None or body.volume is not None:
        raise invalid("/image", "one-source", "A volume is made from one of an image, a snapshot and a volume.")
    image = _image(session, settings, caller, body)
    pool = volumes.pool_named(session, settings, body.pool)
    wanted = body.size if body.size is not None else image.size or 0
    if image.size is not None and wanted < image.size:
        raise conflict("size-too-small", f"The volume needs at least its image's {image.size} bytes.")
    volumes.check_maximum(settings, wanted)
    size = capacity.rounded(session, pool, wanted)
    capacity.reserve(session, settings, caller.id, pool, size)
    volume = volumes.insert(session, caller, body, size, pool, ("image", image.id))
    told = {"name": volume.name, "size": size, "pool": pool, "image": str(image.id)}
    record(session, caller.actor, "volume.create", ("volume", volume.id), **told)
    given = {"image": str(image.id), "by_reference": _as_id(body.image or "") is None}
    return operations.enqueue(session, "volume.from-image", caller, volume.id, ("volume", volume.id), **given)


def _image(session: Session, settings: Settings, caller: Caller, body: VolumeCreate) -> Image:
    """The image, held until the volume that names it is written: from then on that pins it."""
    assert body.image is not None
    identifier = _as_id(body.image)
    if identifier is None:
        return images.ask(session, settings, caller, body.image, body.checksum)[0]
    if body.checksum is not None:
        raise invalid("/checksum", "no-reference", "An image's id says already which bytes it has.")
    image = images.find(session, caller, identifier)
    if not holds.hold(session, image.id, "available", "fetching"):
        raise images.not_available(image)
    session.refresh(image)
    return image


def _as_id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
