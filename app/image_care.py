"""The cache of images, looked after: activated, watched, kept below its marks, its images read again by and by.

Nothing is removed here: what has to go is marked as deleting, with the operation that removes it.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import holds, operations
from app.config import bytes_of_mark
from app.events import SYSTEM, record
from app.library import open_library
from app.models import Image, ImageCache, Operation
from app.operations import OPEN
from app.outside import Outside
from app.states import now
from blockdev.units import format_size
from imagecache.errors import ImageError
from imagecache.eviction import Candidate, choose

log = structlog.get_logger()
#: The only cache there is.
NAME = "images"
#: States whose row can go without anybody's work being undone.
AT_REST = ("available", "deleting", "error")


def watch(outside: Outside) -> None:
    """Activate the cache if it is not, write down how full it is, and let go what is too much."""
    try:
        if outside.library is None:
            _activate(outside)
        _observe(outside)
    except (ImageError, OSError, ValueError) as error:
        outside.library = None
        _unusable(outside, str(error))
        return
    tidy(outside)


def _activate(outside: Outside) -> None:
    with outside.database.read() as session:
        known: UUID | None = session.scalar(select(ImageCache.cache_id).where(ImageCache.name == NAME))
    directory = outside.settings.image_dir
    if directory.is_relative_to(outside.settings.home) and known is None:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    library = open_library(outside.settings)
    cache_id = library.cache.activate(known)
    swept = library.cache.sweep()
    log.info("cache of images active", path=str(directory), swept=swept)
    with outside.database.write() as session:
        row = _row(session)
        row.cache_id, row.state, row.reason = cache_id, "active", None
        record(session, SYSTEM, "image-cache.active", cache=str(cache_id))
    outside.library = library


def _row(session: Session) -> ImageCache:
    row = session.get(ImageCache, NAME)
    if row is None:
        row = ImageCache(name=NAME, state="unusable", reason="not activated yet", size=0, free=0, allocated=0)
        session.add(row)
    return row


def _observe(outside: Outside) -> None:
    assert outside.library is not None
    usage = outside.library.cache.usage()
    reserve = outside.settings.images.reserve
    alarm = None
    if usage.free < reserve:
        alarm = f"only {format_size(usage.free)} free: no image is taken until there are {format_size(reserve)}"
    with outside.database.write() as session:
        row = _row(session)
        row.size, row.free, row.allocated, row.updated_at = usage.size, usage.free, usage.allocated, now()
        if (alarm is None) != (row.alarm is None):
            kind = "image-cache.alarm" if alarm else "image-cache.alarm-over"
            record(session, SYSTEM, kind, alarm=alarm, free=usage.free)
            log.warning(kind, alarm=alarm)
        row.alarm = alarm


def _unusable(outside: Outside, reason: str) -> None:
    with outside.database.write() as session:
        row = _row(session)
        if row.state == "active" or row.reason != reason:
            record(session, SYSTEM, "image-cache.unusable", reason=reason)
            log.error("cache of images unusable", reason=reason)
        row.state, row.reason, row.updated_at = "unusable", reason, now()


# ---------------------------------------------------------------- room


def tidy(outside: Outside) -> list[str]:
    """Above the high mark, what was not used for longest goes, down to the low one; the digests."""
    assert outside.library is not None
    usage, configured = outside.library.cache.usage(), outside.settings.images
    low, high = bytes_of_mark(configured.low_mark, usage.size), bytes_of_mark(configured.high_mark, usage.size)
    with outside.database.read() as session:
        found = _candidates(session)
    return _let_go(outside, choose(found, sum(c.allocated for c in found), min(low, high), high))


def make_room(outside: Outside, needed: int, least: int = 0) -> bool:
    """The cache is full: let the least recently used go, for `needed` bytes, or for a tenth of what is there; nothing
    more while something is going already, and nothing for what needs `least` bytes and would not fit all the same.
    Whether there will be more room."""
    assert outside.library is not None
    with outside.database.read() as session:
        found = _candidates(session)
        going = select(Operation.id).where(Operation.kind == "image.delete", Operation.state.in_(OPEN)).limit(1)
        under_way = session.scalar(going) is not None
    if under_way:
        return True
    can_go = sum(candidate.allocated for candidate in found if not candidate.pinned)
    if outside.library.cache.usage().free + can_go - outside.settings.images.reserve < least:
        return False
    held = sum(candidate.allocated for candidate in found)
    left = max(held - max(needed, held // 10, 1), 0)
    return bool(_let_go(outside, choose(found, held, left, left)))


def _candidates(session: Session) -> list[Candidate]:
    """By file: one is pinned when anything depends on any of its rows, when one of them cannot be had again, or when
    somebody is at work on it. A file that is going already is none."""
    kept = (holds.pinned() | (Image.origin_kind != "reference") | Image.state.not_in(AT_REST)).label("kept")
    wanted = select(Image.digest, Image.allocated, Image.used_at, Image.state, kept).where(Image.digest.is_not(None))
    by_digest: dict[str, list[tuple[int, dt.datetime, str, bool]]] = defaultdict(list)
    for digest, allocated, used_at, state, is_kept in session.execute(wanted):
        by_digest[digest or ""].append((allocated or 0, used_at, state, bool(is_kept)))
    return [
        Candidate(digest, max(r[0] for r in found), max(r[1] for r in found), any(r[3] for r in found))
        for digest, found in by_digest.items()
        if any(row[2] != "deleting" for row in found)
    ]


def _let_go(outside: Outside, digests: Iterable[str]) -> list[str]:
    return [digest for digest in digests if _evict(outside, digest)]


class _Kept(Exception):
    """Somebody began to use it since we looked: all of it stays."""


def _evict(outside: Outside, digest: str) -> bool:
    """All rows of the file or none."""
    try:
        with outside.database.write() as session:
            rows = select(Image).where(Image.digest == digest, Image.state != "deleting").order_by(Image.id)
            for image in session.scalars(rows).all():
                if not holds.take_away(session, image.id, Image.origin_kind == "reference"):
                    raise _Kept
                record(session, SYSTEM, "image.evict", ("image", image.id), digest=digest, allocated=image.allocated)
                operations.enqueue(session, "image.delete", None, image.id, ("image", image.id))
    except _Kept:
        return False
    log.info("image evicted", digest=digest)
    return True


# ---------------------------------------------------------------- by and by


def scrub_next(outside: Outside) -> None:
    """One image after the other is read again, whose turn it is: one at a time, and no file twice."""
    before = now() - dt.timedelta(seconds=outside.settings.images.scrub_interval)
    due = select(Image).where(Image.state == "available", Image.digest.is_not(None), Image.verified_at < before)
    busy = select(Operation.id).where(Operation.kind == "image.scrub", Operation.state.in_(OPEN)).limit(1)
    with outside.database.write() as session:
        image = session.scalar(due.order_by(Image.verified_at).limit(1))
        if image is not None and session.scalar(busy) is None:
            operations.enqueue(session, "image.scrub", None, image.id, ("image", image.id))
