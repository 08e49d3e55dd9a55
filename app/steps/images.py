"""Images: fetched, made of a guest's disk, judged, read again, removed.

Two locks order the fetches. One for the bytes that are wanted (by the strongest digest that was told): two references
to the same bytes are one download, and who waits gives its thread away meanwhile. One for the file that was made (by
its digest): whoever takes a file away looks, with that lock in hand, whether a row names it, and whoever made a file
names it in a row, with that lock in hand, before anything else can happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app import capacity, operations
from app.db import change
from app.events import SYSTEM, Actor, record
from app.holds import hold, pinned
from app.image_care import make_room
from app.images import add_once, request_key, safe
from app.models import GoldenCopy, Image, ImageAsker, Operation, Snapshot, Volume
from app.operations import Cancelled, actor_of, guarded
from app.states import now, transition
from app.steps import golden
from app.steps.job import Again, CloneNeedsDetach, Job, Settle, Vanished
from app.steps.judging import entry_of, facts_of, judged, may_be_fetched, passing, report, resolution_of, still_passes
from app.steps.volumes import release_source
from imagecache.cache import Cache
from imagecache.entries import Entry, Fetched, Format, Stored
from imagecache.errors import CacheFull, ImageError, NotCached
from imagecache.fetch import Wanted
from imagecache.identifiers import sha1_of
from imagecache.resolve import Resolution

#: Seconds until somebody who waits for the same bytes looks again.
PATIENCE = 1.0


def _told(session: Session, operation: Operation, kind: str, **detail: object) -> None:
    resource = ("image", operation.resource_id)
    record(session, actor_of(operation), kind, resource, operation=str(operation.id), **detail)


def cause_of(error: Exception) -> str:
    """What may be written to a record: our own words, which hold no secrets of a URL."""
    return str(error) if isinstance(error, ImageError) else f"{type(error).__name__}; the worker's log says more"


# ---------------------------------------------------------------- fetch


def fetch(job: Job) -> Settle:
    image = job.load(Image, state="fetching")
    with job.lock():
        resolution, passed = _found(job, image)
        size = passed.size if passed else None
        with _alone_with_the_bytes(job, passed), room(job, size, size or 0):
            stored, passed = _had_already(job, image, resolution, passed) or _download(job, image, resolution, passed)
            name_file(job, image.id, stored.digest)
    public = resolution.kind != "image"

    def settle(session: Session) -> None:
        known = {"facts": facts_of(resolution, passed), "identifier": passed.identifier}
        known["verified_by"] = ":".join(passed.strongest) if passed.strongest else None
        if image.verified_at is None:
            asked_for = job.operation.parameters.get("visibility")
            known["visibility"] = asked_for or ("public" if public else "private")
        keep(session, job.operation, stored, **known)
        _told(session, job.operation, "image.fetched", digest=stored.digest, size=stored.size, by=resolution.kind)
        _wake_volumes(session, image.id)

    return settle


@contextmanager
def room(job: Job, needed: int | None, least: int = 0) -> Iterator[None]:
    """Where the cache is full, images that nobody needs make room, and the work is done once more."""
    try:
        yield
    except CacheFull as error:
        if not make_room(job.outside, 2 * (needed or 0), least):
            raise
        raise Again(PATIENCE, "waiting for room in the cache of images") from error


def _found(job: Job, image: Image) -> tuple[Resolution, Entry | None]:
    """What is said about the image, found once for all tries, judged at each; written down for who looks."""
    library = job.library()
    assert image.reference is not None
    if image.facts is not None and "source" in image.facts:
        known = resolution_of(image.reference, image.facts)
        return known, passing(library, known.entries, safe(image.reference))
    resolution = library.resolver.resolve(image.reference, image.checksum, job.check)
    if not resolution.entries:
        may_be_fetched(library, resolution)
        return resolution, None
    passed = passing(library, resolution.entries, safe(image.reference))
    strongest = passed.strongest
    found: dict[str, Any] = {"facts": facts_of(resolution, passed), "identifier": passed.identifier}
    found["verified_by"] = ":".join(strongest) if strongest else None
    with job.outside.database.write() as session:
        guarded(session, job.operation, message="found")
        change(session, update(Image).where(Image.id == image.id).values(**found))
    return resolution, passed


@contextmanager
def _alone_with_the_bytes(job: Job, passed: Entry | None) -> Iterator[None]:
    """One download of the same bytes at a time, whatever references lead to them."""
    strongest = passed.strongest if passed else None
    if strongest is None:
        yield
        return
    lock = job.library().cache.lock(f"source-{strongest[1][:2]}")
    with job.elsewhere(lock, PATIENCE, "waiting for another fetch of the same bytes"):
        yield


def _had_already(job: Job, image: Image, resolution: Resolution, passed: Entry | None) -> tuple[Stored, Entry] | None:
    """The same bytes under another reference, verified by the same digest: by SHA-1 alone nothing is the same as what
    a SHA-256 was verified of. Whatever else is said of them must be known to be true: if not, they are downloaded."""
    strongest = passed.strongest if passed else None
    if passed is None or strongest is None:
        return None
    same = select(Image).where(
        Image.verified_by == ":".join(strongest), Image.state == "available", Image.id != image.id
    )
    with job.outside.database.read() as session:
        found = session.scalars(same).all()
    library, said = job.library(), _said(resolution, passed)
    other = next((other for other in found if _serves(library.cache, other, passed, said)), None)
    if other is None:
        return None
    known = replace(passed, other_digests=tuple((other.source_digests or {}).values()))
    return _stored(other), passing(library, [known], safe(resolution.reference))


def _said(resolution: Resolution, passed: Entry) -> set[tuple[str, str]]:
    """Every digest that the asker demands, that the entry tells, and that a Marketplace's identifier is."""
    named = {"sha1": sha1_of(passed.identifier)} if passed.identifier else {}
    return {*resolution.checksums.items(), *passed.checksums.items(), *named.items()}


def _serves(cache: Cache, other: Image, passed: Entry, said: set[tuple[str, str]]) -> bool:
    facts = other.facts or {}
    told = facts.get("size")
    if passed.format not in (None, other.source_format) or (passed.size and told and passed.size != told):
        return False
    if not said <= {*(other.source_digests or {}).items(), *facts.get("checksums", {}).items()}:
        return False
    assert other.digest is not None
    return _is_there(cache, other.digest)


def _stored(image: Image) -> Stored:
    assert image.digest
    assert image.size is not None
    assert image.file_size is not None
    assert image.allocated is not None
    source_format: Format = "qcow2" if image.source_format == "qcow2" else "raw"
    return Stored(image.digest, image.size, image.file_size, image.allocated, image.source_digests or {}, source_format)


def _download(job: Job, image: Image, resolution: Resolution, passed: Entry | None) -> tuple[Stored, Entry]:
    library = job.library()
    accepted: list[Entry] = [] if passed is None else [passed]

    def accept(fetched: Fetched) -> Entry | None:
        """Nobody was known to say anything about it: now that its digests are known, somebody may. What was known
        already is judged again by all its digests, and kept as it was said."""
        known = library.resolver.by_digest(resolution, fetched, job.check)
        found = passing(library, known.entries, safe(resolution.reference))
        accepted[:] = accepted or [found]
        return found

    wanted = _wanted(job, resolution, passed)
    format = passed.format if passed else None
    stored = library.store.add(image.id, wanted, format, job.meter("fetched", "converted"), accept)
    return stored, accepted[0]


def _wanted(job: Job, resolution: Resolution, passed: Entry | None) -> Wanted:
    most = job.outside.settings.images.max_source_size
    if passed is None:
        assert resolution.location is not None
        return Wanted((resolution.location,), resolution.checksums or {}, None, None, most)
    locations = passed.locations or tuple(filter(None, [resolution.location]))
    return Wanted(locations, passed.checksums, passed.size, passed.compression, most, also=resolution.checksums)


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


def _wake_volumes(session: Session, image_id: UUID) -> None:
    """Volumes that wait for the image need not wait for their next look."""
    waiting = select(Volume.id).where(Volume.origin_id == image_id, Volume.state == "creating")
    looked = update(Operation).where(
        Operation.kind == "volume.from-image", Operation.state == "queued", Operation.resource_id.in_(waiting)
    )
    change(session, looked.values(not_before=now()))


def fetch_failed(session: Session, operation: Operation, error: Exception) -> None:
    """One that never was there leaves nothing: the next request tries anew. One that was lost stays, in error: volumes
    and overlays name it; it too is tried anew when it is asked for again."""
    image = session.get(Image, operation.resource_id, populate_existing=True)
    if image is None:
        return
    cause = "it was cancelled" if isinstance(error, Cancelled) else cause_of(error)
    _wake_volumes(session, image.id)
    if image.verified_at is None:
        forget(session, image)
        _told(session, operation, "image.failed", cause=cause)
    else:
        transition(session, Image, image.id, "error", error=cause)
        _told(session, operation, "image.error", cause=cause)


def forget(session: Session, image: Image) -> None:
    """The record goes, with who asked for it; its owner is no longer charged."""
    kept = image.origin_kind != "reference"
    capacity.release_kept(session, image.owner_id, image.charged, count=1 if kept else 0)
    change(session, delete_rows(ImageAsker).where(ImageAsker.image_id == image.id))
    change(session, delete_rows(Image).where(Image.id == image.id))


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
        _told(session, job.operation, "image.made", digest=stored.digest, size=stored.size, **told)

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
    _told(session, operation, "image.failed", cause=cause)


# ---------------------------------------------------------------- judge, join


def join(job: Job) -> Settle:
    """Somebody asks for what is there: they may use it if the policy of today still lets it pass."""
    image = job.load(Image, state="available")
    still_passes(job.library(), image)

    def settle(session: Session) -> None:
        if hold(session, image.id, "available") and job.operation.principal_id is not None:
            add_once(session, ImageAsker(image_id=image.id, user_id=job.operation.principal_id))
            _told(session, job.operation, "image.join")

    return settle


def join_failed(session: Session, operation: Operation, error: Exception) -> None:
    _told(session, operation, "image.refused", cause=cause_of(error))


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
            return lambda session: _told(session, job.operation, "image.rotten", digest=digest)

    def settle(session: Session) -> None:
        seen = update(Image).where(Image.digest == digest, Image.state == "available")
        change(session, seen.values(verified_at=now()))

    return settle


def lost(write: Any, cache: Cache, digest: str, actor: Actor = SYSTEM, *, missing: bool) -> bool:
    """The file is not what it was, or `missing`: it is set aside, and no row offers it any more. Images that can be had
    again are fetched; the others are in error, an alarm for whoever reads the events. Whether any row had offered it;
    one that was missing and is there by now is left alone."""
    with cache.lock(f"file-{digest[:2]}"), write() as session:
        if missing and _is_there(cache, digest):
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


def _is_there(cache: Cache, digest: str) -> bool:
    try:
        cache.path(digest)
    except NotCached:
        return False
    return True


def scrub_failed(session: Session, operation: Operation, error: Exception) -> None:
    _told(session, operation, "image.scrub-failed", cause=cause_of(error))


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
            _told(session, job.operation, "image.deleted", name=found.name, digest=found.digest)

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
    _told(session, operation, "image.error", cause=cause_of(error))
