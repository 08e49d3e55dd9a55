"""Images fetched by their reference.

A lock for the bytes that are wanted (by the strongest digest that was told) orders the fetches: two references to the
same bytes are one download, and who waits gives its thread away meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db import change
from app.images import safe
from app.models import Image, Operation
from app.operations import Cancelled, guarded
from app.states import transition
from app.steps.job import Job, Settle
from app.steps.judging import facts_of, may_be_fetched, passing, resolution_of
from app.steps.keeping import PATIENCE, cause_of, forget, is_there, keep, name_file, room, told_of, wake_volumes
from imagecache.cache import Cache
from imagecache.entries import Entry, Fetched, Format, Stored
from imagecache.fetch import Wanted
from imagecache.identifiers import sha1_of
from imagecache.resolve import Resolution


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
        told_of(session, job.operation, "image.fetched", digest=stored.digest, size=stored.size, by=resolution.kind)
        wake_volumes(session, image.id)

    return settle


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
    return is_there(cache, other.digest)


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


def fetch_failed(session: Session, operation: Operation, error: Exception) -> None:
    """One that never was there leaves nothing: the next request tries anew. One that was lost stays, in error: volumes
    and overlays name it; it too is tried anew when it is asked for again."""
    image = session.get(Image, operation.resource_id, populate_existing=True)
    if image is None:
        return
    cause = "it was cancelled" if isinstance(error, Cancelled) else cause_of(error)
    wake_volumes(session, image.id)
    if image.verified_at is None:
        forget(session, image)
        told_of(session, operation, "image.failed", cause=cause)
    else:
        transition(session, Image, image.id, "error", error=cause)
        told_of(session, operation, "image.error", cause=cause)
