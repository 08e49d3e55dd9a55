"""The images' rows against the cache's files, and the golden copies' rows against what is in the pools."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.drift import Drift
from app.models import GoldenCopy, Image, Operation
from app.outside import Outside
from app.steps import golden
from app.steps.images import lost
from imagecache.errors import ImageError

MISSING, ORPHAN, GOLDEN_LOST, GOLDEN_LEFT = "image", "image-file", "golden-copy", "golden-copy-leftover"


def look(outside: Outside, backings: dict[str, set[UUID]]) -> Iterator[Drift]:
    """All differences, changing nothing. `backings`: the volumes that were found in each pool."""
    yield from _files(outside)
    yield from _golden(outside, backings)


def _files(outside: Outside) -> Iterator[Drift]:
    if outside.library is None:
        return  # told by whoever tried to activate it
    with outside.database.read() as session:
        offered = set(session.scalars(select(Image.digest).where(Image.state == "available")))
    try:
        found = {item.digest for item in outside.library.cache.inventory()}
    except (ImageError, OSError) as error:
        yield Drift("image-cache", None, str(error), "report it")
        return
    for digest in sorted(filter(None, offered - found)):
        yield Drift(MISSING, None, "its file is missing", "fetch it again, or mark it as in error", subject=digest)
    with outside.database.read() as session:
        unnamed = found - set(session.scalars(select(Image.digest).where(Image.digest.in_(found))))
        if _at_work(session):  # somebody may be about to name it
            return
    for digest in sorted(unnamed):
        yield Drift(ORPHAN, None, "a file of no image", "remove it", subject=digest)


def _at_work(session: Session) -> bool:
    running = select(Operation.id).where(Operation.lane == "image", Operation.state == "running").limit(1)
    return session.scalar(running) is not None


def _golden(outside: Outside, backings: dict[str, set[UUID]]) -> Iterator[Drift]:
    with outside.database.read() as session:
        copies = session.scalars(select(GoldenCopy).where(GoldenCopy.pool.in_(backings))).all()
        named = set(session.scalars(select(Image.digest).where(Image.digest.in_({copy.digest for copy in copies}))))
    for copy in copies:
        if copy.state != "available":
            if _is_left(outside, copy.id):
                yield Drift(GOLDEN_LEFT, None, "half-made, and nobody is at it", "remove it", subject=str(copy.id))
        elif copy.id not in backings[copy.pool]:
            yield Drift(GOLDEN_LOST, None, "has no backing", "make it again when it is needed", subject=str(copy.id))
        elif copy.digest not in named:
            yield Drift(GOLDEN_LEFT, None, "its image is gone", "remove it", subject=str(copy.id))


def _is_left(outside: Outside, identifier: UUID) -> bool:
    lock = outside.lock(identifier, "data")
    if not lock.try_lock():
        return False
    lock.release()
    return True


def converge(outside: Outside, drift: Drift) -> None:
    """Look once more, and do what was planned."""
    assert drift.subject is not None
    if drift.layer == MISSING:
        _refetch(outside, drift.subject)
    elif drift.layer == ORPHAN:
        _remove_orphan(outside, drift.subject)
    elif drift.layer == GOLDEN_LOST:
        with outside.database.write() as session:
            golden.lose(session, UUID(drift.subject))
    elif not golden.leftover(outside, UUID(drift.subject)):
        golden.remove(outside, UUID(drift.subject))


def _refetch(outside: Outside, digest: str) -> None:
    if outside.library is not None:
        lost(outside.database.write, outside.library.cache, digest, missing=True)


def _remove_orphan(outside: Outside, digest: str) -> None:
    if outside.library is None:
        return
    with outside.library.cache.lock(f"file-{digest[:2]}"):
        with outside.database.read() as session:
            named = session.scalar(select(Image.id).where(Image.digest == digest).limit(1))
            if named is not None or _at_work(session):
                return
        outside.library.cache.evict(digest)
