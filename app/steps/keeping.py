"""What every new image has in common: room for it, a name for its file, its row, and who waits for it.

A lock for the file that was made (by its digest) orders those who name it and those who take it away: whoever takes a
file away looks, with that lock in hand, whether a row names it, and whoever made a file names it in a row, with that
lock in hand, before anything else can happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import capacity
from app.db import change
from app.events import record
from app.image_care import make_room
from app.models import Image, ImageAsker, Operation, Volume
from app.operations import actor_of, guarded
from app.states import now, transition
from app.steps.job import Again, Job
from imagecache.cache import Cache
from imagecache.entries import Stored
from imagecache.errors import CacheFull, ImageError, NotCached

#: Seconds until somebody who waits for room, or for the same bytes, looks again.
PATIENCE = 1.0


def told_of(session: Session, operation: Operation, kind: str, **detail: object) -> None:
    resource = ("image", operation.resource_id)
    record(session, actor_of(operation), kind, resource, operation=str(operation.id), **detail)


def cause_of(error: Exception) -> str:
    """What may be written to a record: our own words, which hold no secrets of a URL."""
    return str(error) if isinstance(error, ImageError) else f"{type(error).__name__}; the worker's log says more"


@contextmanager
def room(job: Job, needed: int | None, least: int = 0) -> Iterator[None]:
    """Where the cache is full, images that nobody needs make room, and the work is done once more."""
    try:
        yield
    except CacheFull as error:
        if not make_room(job.outside, 2 * (needed or 0), least):
            raise
        raise Again(PATIENCE, "waiting for room in the cache of images") from error


def name_file(job: Job, image_id: UUID, digest: str) -> None:
    """Name the file in the image's row: from now on nobody takes it away. Raises Again when somebody just has."""
    cache = job.library().cache
    with cache.lock(f"file-{digest[:2]}"):
        try:
            cache.path(digest)
        except NotCached:
            raise Again(0.1, "the same image was just deleted; once more") from None
        with job.outside.database.write() as session:
            guarded(session, job.operation, message="committed")
            change(session, update(Image).where(Image.id == image_id).values(digest=digest))


def keep(session: Session, operation: Operation, stored: Stored, **values: Any) -> None:
    """The image is there: to be committed with its operation's end."""
    described: dict[str, Any] = {"size": stored.size, "file_size": stored.file_size, "allocated": stored.allocated}
    described |= {"source_digests": dict(stored.source_digests), "source_format": stored.source_format}
    described |= {"digest": stored.digest, "error": None, "verified_at": now(), "used_at": now()}
    transition(session, Image, operation.resource_id, "available", **described, **values)


def recharge(session: Session, image_id: UUID, size: int) -> None:
    """Its owner is charged with what is kept, now that this is known, and no longer with what was expected."""
    image = session.get_one(Image, image_id, populate_existing=True)
    capacity.release_kept(session, image.owner_id, image.charged - size, count=0)
    change(session, update(Image).where(Image.id == image_id).values(charged=size))


def wake_volumes(session: Session, image_id: UUID) -> None:
    """Volumes that wait for the image need not wait for their next look."""
    waiting = select(Volume.id).where(Volume.origin_id == image_id, Volume.state == "creating")
    looked = update(Operation).where(
        Operation.kind == "volume.from-image", Operation.state == "queued", Operation.resource_id.in_(waiting)
    )
    change(session, looked.values(not_before=now()))


def forget(session: Session, image: Image) -> None:
    """The record goes, with who asked for it; its owner is no longer charged."""
    kept = image.origin_kind != "reference"
    capacity.release_kept(session, image.owner_id, image.charged, count=1 if kept else 0)
    change(session, delete_rows(ImageAsker).where(ImageAsker.image_id == image.id))
    change(session, delete_rows(Image).where(Image.id == image.id))


def is_there(cache: Cache, digest: str) -> bool:
    try:
        cache.path(digest)
    except NotCached:
        return False
    return True
