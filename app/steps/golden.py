"""Golden copies: an image's bytes as a volume of a pool, made once, cloned by every volume that begins with them.

    no row ──▶ creating ──made, durably──▶ available ──▶ deleting ──▶ no row

Its row is written, and the pool charged, before a byte is; only an `available` one is cloned. Who makes or removes one
holds the lock of its id, which ends with its process: what is `creating` and not locked is a leftover.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy import exists, select, update
from sqlalchemy.orm import Session

from app import capacity
from app.db import change
from app.errors import Problem
from app.events import SYSTEM, record
from app.ids import new_id
from app.images import add_once
from app.models import GoldenCopy, Image, Volume
from app.outside import Outside
from app.states import now
from app.steps.job import Again, Job, Refusal
from imagecache.errors import TargetFull
from pools import Pool, PoolFull

#: Seconds until somebody who waits for a golden copy looks again.
PATIENCE = 0.5


def golden_copy(job: Job, digest: str, size: int, pool_name: str) -> GoldenCopy:
    """The pool's golden copy of the image, made if there is none. Raises Again while somebody else makes it."""
    row = _row(job, digest, size, pool_name)
    if row.state == "available":
        return row
    lock = job.outside.lock(row.id, "data")
    with job.elsewhere(lock, PATIENCE, "waiting for the pool's golden copy of the image"):
        with job.outside.database.read() as session:
            found = session.get(GoldenCopy, row.id)
        if found is None or found.state == "deleting":
            raise Again(PATIENCE, "waiting for the pool to let go of an older golden copy")
        if found.state == "creating":
            _make(job, found)
        return found


def _row(job: Job, digest: str, size: int, pool_name: str) -> GoldenCopy:
    """Used now, so that it is not what goes when the pool needs room."""
    wanted = (GoldenCopy.digest == digest, GoldenCopy.pool == pool_name)
    with job.outside.database.write() as session:
        change(session, update(GoldenCopy).where(*wanted).values(used_at=now()))
        row = session.scalar(select(GoldenCopy).where(*wanted))
        if row is None:
            row = _promised(session, digest, capacity.rounded(session, pool_name, size), pool_name)
    return row


def _promised(session: Session, digest: str, size: int, pool_name: str) -> GoldenCopy:
    moment = now()
    row = GoldenCopy(
        id=new_id(), digest=digest, pool=pool_name, size=size, state="creating", used_at=moment, created_at=moment
    )
    if not add_once(session, row):
        raise Again(0, "somebody else has just begun with the golden copy")
    try:
        capacity.promise(session, pool_name, size)
    except Problem as problem:
        raise Refusal(problem.code, problem.detail) from problem
    record(session, SYSTEM, "golden.create", ("golden-copy", row.id), digest=digest, pool=pool_name, size=size)
    return row


def _make(job: Job, row: GoldenCopy) -> None:
    """From nothing: what an earlier try left may be half of it."""
    pool = job.pool(row.pool)
    pool.delete_volume(row.id)
    pool.create(row.id, row.size)
    try:
        path = pool.backing(row.id).path
        job.library().store.to_raw(row.digest, path, job.meter("written"), reads_as_zeros=True)
    except TargetFull as error:
        raise PoolFull(row.pool, str(error)) from error
    with job.outside.database.write() as session:
        made = update(GoldenCopy).where(GoldenCopy.id == row.id, GoldenCopy.state == "creating")
        change(session, made.values(state="available"))
        record(session, SYSTEM, "golden.created", ("golden-copy", row.id), digest=row.digest, pool=row.pool)


# ---------------------------------------------------------------- the end of one


def unneeded() -> list[object]:
    """Conditions: no volume of its pool began with these bytes. Such a volume's changes are found against it."""
    begun = exists().where(
        Volume.pool == GoldenCopy.pool,
        Volume.origin_kind == "image",
        Volume.origin_id == Image.id,
        Image.digest == GoldenCopy.digest,
    )
    return [~begun]


def spare(outside: Outside, pool_name: str) -> bool:
    """The pool has little room: of its golden copies that no volume needs, the least recently used goes; whether one
    did."""
    idle = select(GoldenCopy.id).where(
        GoldenCopy.pool == pool_name,
        GoldenCopy.state == "available",
        *unneeded(),  # type: ignore[arg-type]
    )
    with outside.database.read() as session:
        oldest = session.scalar(idle.order_by(GoldenCopy.used_at).limit(1))
    return oldest is not None and remove(outside, oldest)


def remove(outside: Outside, identifier: UUID) -> bool:
    """Take a golden copy away that no volume needs; whether it is gone. Skipped while its pool is not active."""
    with outside.lock(identifier, "data"):
        with outside.database.write() as session:
            session.scalar(select(GoldenCopy.id).where(GoldenCopy.id == identifier).with_for_update())
            going = update(GoldenCopy).where(GoldenCopy.id == identifier, *unneeded())  # type: ignore[arg-type]
            if change(session, going.values(state="deleting")) == 0:
                return False
            row = session.get_one(GoldenCopy, identifier, populate_existing=True)
        return _removed(outside, row, outside.pools.get(row.pool))


def _removed(outside: Outside, row: GoldenCopy, pool: Pool | None) -> bool:
    if pool is None:
        return False
    pool.delete_volume(row.id)
    with outside.database.write() as session:
        if change(session, delete_rows(GoldenCopy).where(GoldenCopy.id == row.id)):
            capacity.release_promise(session, row.pool, row.size)
            record(session, SYSTEM, "golden.deleted", ("golden-copy", row.id), digest=row.digest, pool=row.pool)
    return True


def lose(session: Session, identifier: UUID) -> None:
    """Its bytes are gone: the next who needs it makes it again."""
    lost = update(GoldenCopy).where(GoldenCopy.id == identifier, GoldenCopy.state == "available")
    if change(session, lost.values(state="creating")):
        record(session, SYSTEM, "golden.lost", ("golden-copy", identifier))


def leftover(outside: Outside, identifier: UUID) -> bool:
    """Remove what somebody began and did not end; whether it was that, and is gone now."""
    lock = outside.lock(identifier, "data")
    if not lock.try_lock():
        return False
    try:
        with outside.database.read() as session:
            row = session.get(GoldenCopy, identifier)
        if row is None or row.state == "available":
            return False
        return _removed(outside, row, outside.pools.get(row.pool))
    finally:
        lock.release()
