"""Images: made of a guest's disk, judged, read again, removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app import operations
from app.db import change
from app.events import SYSTEM, Actor, record
from app.holds import hold, pinned
from app.images import add_once, request_key, safe
from app.models import GoldenCopy, Image, ImageAsker, Operation, Snapshot, Volume
from app.operations import Cancelled, actor_of
from app.states import now, transition
from app.steps import golden
from app.steps.job import CloneNeedsDetach, Job, Settle, Vanished
from app.steps.judging import entry_of, judged, report, still_passes
from app.steps.keeping import cause_of, forget, is_there, keep, name_file, recharge, room, told_of
from app.steps.volumes import release_source
from imagecache.cache import Cache
from imagecache.entries import Entry
from imagecache.errors import NotCached

# ---------------------------------------------------------------- from a volume or a snapshot


def from_volume(job: Job) -> Settle:
    image = job.load(Image, state="fetching")
    with job.lock():
        with _bytes_of_source(job, image) as (path, size), room(job, image.charged):
            stored = job.library().store.add_disk(image.id, path, size, job.meter("read"))
        name_file(job, image.id, stored.digest)

    def settle(session: Session) -> None:
        release_origin(session, image)
        keep(session, job.operation, stored)
        recharge(session, image.id, stored.file_size)
        told = {image.origin_kind: str(image.origin_id)}
        told_of(session, job.operation, "image.made", digest=stored.digest, size=stored.size, **told)

    return settle


@contextmanager
def _bytes_of_source(job: Job, image: Image) -> Iterator[tuple[Path, int]]:
    """Where the bytes can be read that are to become an image, and how many.

    A snapshot, and a volume that may be written meanwhile, are cloned first: under the image's id, for as long as they
    are read. Any other volume lies still, since it has a reader.
    """
    source = _source(job, image)
    pool = job.pool(source.pool)
    if isinstance(source, Volume) and not pool.live_clone:
        job.copyable(source.id, CloneNeedsDetach)
        yield pool.backing(source.id, read_only=True).path, source.size
        return
    clone = pool.clone_volume if isinstance(source, Volume) else pool.clone_snapshot
    try:
        clone(source.id, image.id, source.size, job.progress)
        yield pool.backing(image.id, read_only=True).path, source.size
    finally:
        pool.delete_volume(image.id)


def remove_clone(job: Job) -> None:
    """What a try that died may have left."""
    image = job.load(Image)
    job.pool(_source(job, image).pool).delete_volume(image.id)


def _source(job: Job, image: Image) -> Volume | Snapshot:
    """It has a reader as long as the image is made, so it is there."""
    if image.origin_kind == "snapshot":
        return job.load(Snapshot, image.origin_id)
    return job.load(Volume, image.origin_id)


def release_origin(session: Session, image: Image) -> None:
    assert image.origin_id is not None
    release_source(session, Snapshot if image.origin_kind == "snapshot" else Volume, image.origin_id)


def from_volume_failed(session: Session, operation: Operation, error: Exception) -> None:
    image = session.get(Image, operation.resource_id, populate_existing=True)
    if image is None:
        return
    release_origin(session, image)
    forget(session, image)
    cause = "it was cancelled" if isinstance(error, Cancelled) else cause_of(error)
    told_of(session, operation, "image.failed", cause=cause)


# ---------------------------------------------------------------- judge, join


def join(job: Job) -> Settle:
    """Somebody asks for what is there: they may use it if the policy of today still lets it pass."""
    image = job.load(Image, state="available")
    still_passes(job.library(), image)

    def settle(session: Session) -> None:
        if hold(session, image.id, "available") and job.operation.principal_id is not None:
            add_once(session, ImageAsker(image_id=image.id, user_id=job.operation.principal_id))
            told_of(session, job.operation, "image.join")

    return settle


def join_failed(session: Session, operation: Operation, error: Exception) -> None:
    told_of(session, operation, "image.refused", cause=cause_of(error))


def judge(job: Job) -> Settle:
    """What is known of an image that was fetched before is judged as it is known."""
    library, given = job.library(), job.operation.parameters
    known = select(Image.facts).where(
        Image.request_key == request_key(given["reference"], given["checksum"]), Image.state == "available"
    )
    with job.outside.database.read() as session:
        facts = session.scalar(known)
    if facts is not None and "source" in facts:
        entries: tuple[Entry, ...] = (entry_of(facts),)
    else:
        entries = library.resolver.resolve(given["reference"], given["checksum"], job.check).entries
    result = report(given["reference"], judged(library, entries))

    def settle(session: Session) -> None:
        change(session, update(Operation).where(Operation.id == job.operation.id).values(result=result))
        passed = result["passed"] is not None
        record(session, actor_of(job.operation), "image.judged", reference=safe(given["reference"]), passed=passed)

    return settle


def judge_failed(session: Session, operation: Operation, error: Exception) -> None:
    reference = safe(operation.parameters["reference"])
    record(session, actor_of(operation), "image.judge-failed", reference=reference, cause=cause_of(error))


# ---------------------------------------------------------------- scrub


def scrub(job: Job) -> Settle:
    """Read the file again. What is not what it was is set aside, and fetched anew where that can be done."""
    image = job.load(Image, state="available")
    assert image.digest is not None
    digest, cache = image.digest, job.library().cache
    with job.lock():
        try:
            sound, there = cache.verify(digest, job.meter("read")), True
        except NotCached:
            sound, there = False, False
        if not sound:
            if not lost(job.outside.database.write, cache, digest, actor_of(job.operation), missing=not there):
                raise Vanished  # it was evicted meanwhile
            return lambda session: told_of(session, job.operation, "image.rotten", digest=digest)

    def settle(session: Session) -> None:
        seen = update(Image).where(Image.digest == digest, Image.state == "available")
        change(session, seen.values(verified_at=now()))

    return settle


def lost(write: Any, cache: Cache, digest: str, actor: Actor = SYSTEM, *, missing: bool) -> bool:
    """The file is not what it was, or `missing`: it is set aside, and no row offers it any more. Images that can be had
    again are fetched; the others are in error, an alarm for whoever reads the events. Whether any row had offered it;
    one that was missing and is there by now is left alone."""
    with cache.lock(f"file-{digest[:2]}"), write() as session:
        if missing and is_there(cache, digest):
            return False
        offering = session.scalars(select(Image).where(Image.digest == digest, Image.state == "available")).all()
        for image in offering:
            if image.origin_kind == "reference":
                transition(session, Image, image.id, "fetching", only_from=("available",), error=None)
                operations.enqueue(session, "image.fetch", None, image.id, ("image", image.id))
            else:
                cause = "its file is damaged, and it cannot be had again"
                transition(session, Image, image.id, "error", only_from=("available",), error=cause)
            depended = session.scalar(select(pinned()).where(Image.id == image.id))
            record(session, actor, "image.lost", ("image", image.id), digest=digest, pinned=bool(depended))
        cache.set_aside(digest)
        return bool(offering)


def scrub_failed(session: Session, operation: Operation, error: Exception) -> None:
    told_of(session, operation, "image.scrub-failed", cause=cause_of(error))


# ---------------------------------------------------------------- delete


def delete(job: Job) -> Settle:
    image = job.load(Image, state="deleting")
    with job.lock():
        if image.digest is not None:
            _remove_file(job, image.id, image.digest)
    job.outside.forget_locks(image.id)

    def settle(session: Session) -> None:
        found = session.get(Image, image.id, populate_existing=True)
        if found is not None:
            forget(session, found)
            told_of(session, job.operation, "image.deleted", name=found.name, digest=found.digest)

    return settle


def _remove_file(job: Job, image_id: UUID, digest: str) -> None:
    """With the last row that names it; with its golden copies, of which no volume of any pool was made."""
    cache = job.library().cache
    with cache.lock(f"file-{digest[:2]}"):
        others = select(func.count()).where(Image.digest == digest, Image.id != image_id, Image.state != "deleting")
        copies = select(GoldenCopy.id).where(GoldenCopy.digest == digest)
        with job.outside.database.read() as session:
            if session.scalar(others):
                return
            found = session.scalars(copies).all()
        for copy in found:
            golden.remove(job.outside, copy)
        cache.evict(digest)


def delete_failed(session: Session, operation: Operation, error: Exception) -> None:
    transition(session, Image, operation.resource_id, "error", error=cause_of(error))
    told_of(session, operation, "image.error", cause=cause_of(error))
