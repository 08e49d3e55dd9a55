"""What was sent of an image becomes one."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.models import Image, Operation
from app.operations import Cancelled
from app.steps import keeping
from app.steps.job import Job, Settle
from app.uploads import part


def commit(job: Job) -> Settle:
    """Verify it, look at it, flatten it, keep it. What was sent is swept away once nobody needs it any more.

    That others who want the same bytes by the same digest are given these is out of the question: an uploader of
    colliding ones would choose what they start.
    """
    image = job.load(Image, state="fetching")
    assert image.upload is not None
    assert image.checksum is not None
    told, (algorithm, digest) = image.upload, image.checksum.split(":")
    with job.lock():
        with keeping.room(job, image.charged):
            stored = job.library().store.add_file(
                image.id, part(job.outside.settings, image.id), compression=told["compression"],
                format=told["format"], checksums={algorithm: digest}, progress=job.meter("read"),
            )  # fmt: skip
        keeping.name_file(job, image.id, stored.digest)

    def settle(session: Session) -> None:
        keeping.keep(session, job.operation, stored)
        keeping.recharge(session, image.id, stored.file_size)
        keeping.told_of(session, job.operation, "image.made", digest=stored.digest, size=stored.size, upload=True)

    return settle


def commit_failed(session: Session, operation: Operation, error: Exception) -> None:
    """Nothing stays, and the operation says why: what was sent is not what was announced, or no image."""
    image = session.get(Image, operation.resource_id, populate_existing=True)
    if image is None:
        return
    keeping.forget(session, image)
    cause = "it was cancelled" if isinstance(error, Cancelled) else keeping.cause_of(error)
    keeping.told_of(session, operation, "image.failed", cause=cause)
