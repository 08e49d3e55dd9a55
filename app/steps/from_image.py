"""A volume that begins with an image's bytes: a clone of the pool's golden copy."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import capacity, volumes
from app.db import change
from app.errors import Problem
from app.images import add_once
from app.models import GoldenCopy, Image, ImageAsker, Operation, Volume
from app.operations import Cancelled
from app.states import now, transition
from app.steps import golden
from app.steps.job import Again, Job, Refusal, Settle
from app.steps.judging import still_passes
from app.steps.volumes import broken, forget, told
from pools import BackingMissing

#: Seconds until a volume that waits for its image looks again; the end of the fetch makes it look at once.
PATIENCE = 2.0


def from_image(job: Job) -> Settle:
    volume = job.load(Volume, state="creating")
    image = _image(job, volume)
    still_passes(job.library(), image)
    size = volume.size or _charged(job, volume, image)
    assert image.size is not None
    if size < image.size:
        raise Refusal("size-too-small", f"The volume needs at least its image's {image.size} bytes.")
    assert image.digest is not None
    copy = golden.golden_copy(job, image.digest, image.size, volume.pool)
    with job.lock():
        _clone(job, copy, volume, size)

    def settle(session: Session) -> None:
        transition(session, Volume, volume.id, "available", error=None)
        change(session, update(Image).where(Image.id == image.id).values(used_at=now()))
        if job.operation.principal_id is not None and _by_reference(job):
            add_once(session, ImageAsker(image_id=image.id, user_id=job.operation.principal_id))
        told(session, job.operation, "volume.created", volume.id, image=str(image.id), digest=image.digest)

    return settle


def _image(job: Job, volume: Volume) -> Image:
    """The image, once it is there. Raises Again until then, Refusal when it will not be."""
    assert volume.origin_id is not None
    with job.outside.database.read() as session:
        image = session.get(Image, volume.origin_id)
        if image is not None and image.state == "available":
            return image
        fetching = image is not None and image.state == "fetching"
        operation = session.scalar(_work_on(volume.origin_id))
    if fetching:
        raise Again(PATIENCE, f"waiting for the image: {operation.progress if operation else 0} %")
    if operation is not None and operation.error_code:
        told = operation.error_detail if _by_reference(job) else None
        raise Refusal(operation.error_code, told or "The image could not be had.")
    raise Refusal("image-not-available", "The image is gone, or in error.")


def _by_reference(job: Job) -> bool:
    """Whoever named the image by its reference may be told that, and what became of it; by its id, anybody who sees a
    public image can name it."""
    return bool(job.operation.parameters.get("by_reference"))


def _work_on(image_id: UUID):  # type: ignore[no-untyped-def]
    """The newest operation that was to bring the image."""
    bringing = ("image.fetch", "image.from-volume", "image.commit")
    wanted = select(Operation).where(Operation.resource_id == image_id, Operation.kind.in_(bringing))
    return wanted.order_by(Operation.id.desc()).limit(1)


def _charged(job: Job, volume: Volume, image: Image) -> int:
    """The volume gets its image's size, which was not known when it was asked for, and its owner is charged."""
    assert image.size is not None
    settings = job.outside.settings
    try:
        with job.outside.database.write() as session:
            volumes.check_maximum(settings, image.size)
            size = capacity.rounded(session, volume.pool, image.size)
            sized = update(Volume).where(Volume.id == volume.id, Volume.state == "creating", Volume.size == 0)
            if change(session, sized.values(size=size, updated_at=now())):
                capacity.reserve(session, settings, volume.owner_id, volume.pool, size, count=0)
    except Problem as problem:
        raise Refusal(problem.code, problem.detail) from problem
    return size


def _clone(job: Job, copy: GoldenCopy, volume: Volume, size: int) -> None:
    try:
        job.pool(volume.pool).clone_volume(copy.id, volume.id, size, job.progress)
    except BackingMissing as error:
        if error.id != copy.id:
            raise
        with job.outside.database.write() as session:
            golden.lose(session, copy.id)
        raise Again(0, "the pool has lost its golden copy; it is made again") from error


def from_image_failed(session: Session, operation: Operation, error: Exception) -> None:
    """A cancelled one leaves nothing behind; a failed one leaves a volume in error that says why."""
    volume = session.get(Volume, operation.resource_id, populate_existing=True)
    if volume is None:
        return
    if isinstance(error, Cancelled):
        forget(session, operation, volume)
    else:
        broken(session, operation, error)
