"""What an owner may have and what a pool can promise: two counters, each moved by one conditional UPDATE.

Nothing is counted first and decided afterwards, so a hundred requests at once cannot pass a limit together.
"""

from __future__ import annotations

import os
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.config import Settings
from app.db import change
from app.errors import Problem, conflict
from app.models import Image, Pool, User
from blockdev.units import format_size


def reserve(session: Session, settings: Settings, owner_id: UUID, pool: str, size: int, count: int = 1) -> None:
    """Charge `size` bytes and `count` records to the owner and the pool; Problem 409 says which limit refuses."""
    _charge_owner(session, settings, owner_id, size, count)
    _charge_pool(session, pool, size)


def reserve_kept(session: Session, settings: Settings, owner_id: UUID, size: int) -> None:
    """Charge the owner for an image that nobody else could give back: it lies in no pool. Problem 409."""
    _charge_owner(session, settings, owner_id, size, 1)


def rounded(session: Session, pool: str, size: int) -> int:
    """`size` as a volume of the pool really has it, and is charged."""
    granularity = session.scalar(select(Pool.granularity).where(Pool.name == pool)) or 1
    return -(-size // granularity) * granularity


def require_room(session: Session, pool: str) -> None:
    """For work that needs space for a while and promises none; Problem 409 when the pool takes no work."""
    row = session.get_one(Pool, pool, populate_existing=True)
    if row.state != "active" or row.free < row.low_space:
        raise _refusal(row, 0)


def release(session: Session, owner_id: UUID, pool: str, size: int, count: int = 1) -> None:
    """Give back what `reserve` took."""
    used = {"used_size": User.used_size - size, "used_count": User.used_count - count}
    change(session, update(User).where(User.id == owner_id).values(**used))
    release_promise(session, pool, size)


def release_kept(session: Session, owner_id: UUID, size: int, count: int = 1) -> None:
    """Give back what `reserve_kept` took; a negative `size` takes more, which no limit refuses."""
    used = {"used_size": User.used_size - size, "used_count": User.used_count - count}
    change(session, update(User).where(User.id == owner_id).values(**used))


def promise(session: Session, pool: str, size: int) -> None:
    """Charge the pool alone, for what belongs to nobody (a golden copy); Problem 409."""
    _charge_pool(session, pool, size)


def release_promise(session: Session, pool: str, size: int) -> None:
    change(session, update(Pool).where(Pool.name == pool).values(promised=Pool.promised - size))


def limits(settings: Settings, user: User) -> tuple[int, int]:
    """Bytes and records the user may have."""
    size = settings.quota.size if user.quota_size is None else user.quota_size
    count = settings.quota.count if user.quota_count is None else user.quota_count
    return size, count


def _charge_owner(session: Session, settings: Settings, owner_id: UUID, size: int, count: int) -> None:
    fits = (
        User.used_size + size <= func.coalesce(User.quota_size, settings.quota.size),
        User.used_count + count <= func.coalesce(User.quota_count, settings.quota.count),
    )
    charge = (
        update(User)
        .where(User.id == owner_id, *fits)
        .values(used_size=User.used_size + size, used_count=User.used_count + count)
    )
    if change(session, charge) == 1:
        return
    owner = session.get_one(User, owner_id, populate_existing=True)
    allowed_size, allowed_count = limits(settings, owner)
    raise conflict(
        "quota-exceeded",
        f"{owner.name} has {format_size(owner.used_size)} in {owner.used_count} volumes, snapshots and images; allowed "
        f"are {format_size(allowed_size)} and {allowed_count}. Delete some, or ask an admin for more.",
    )


def _charge_pool(session: Session, name: str, size: int) -> None:
    charge = (
        update(Pool)
        .where(
            Pool.name == name,
            Pool.state == "active",
            Pool.free >= Pool.low_space,
            Pool.promised + size <= Pool.size * Pool.overcommit_ratio,
        )
        .values(promised=Pool.promised + size)
    )
    if change(session, charge) == 0:
        raise _refusal(session.get_one(Pool, name, populate_existing=True), size)


def _refusal(pool: Pool, size: int) -> Problem:
    if pool.state != "active":
        return conflict("pool-unusable", f"The pool {pool.name} cannot be used now: {pool.reason}.")
    if pool.free < pool.low_space:
        return conflict(
            "pool-low-space",
            f"The pool {pool.name} has {format_size(pool.free)} free, less than the {format_size(pool.low_space)} "
            "it keeps for the volumes it holds. Ask an admin for room.",
        )
    return conflict(
        "pool-overcommitted",
        f"The pool {pool.name} has promised {format_size(pool.promised)} of at most "
        f"{format_size(int(pool.size * pool.overcommit_ratio))}; {format_size(size)} more do not fit.",
    )


# ---------------------------------------------------------------- room under the home


def require_room_to_upload(session: Session, settings: Settings, size: int) -> None:
    """Problem 409 unless an upload of `size` bytes fits beside all that others may still send, and the reserve."""
    promised = session.scalar(select(func.sum(Image.charged - Image.received)).where(Image.state == "receiving"))
    require_free(settings, size + int(promised or 0))


def require_free(settings: Settings, size: int) -> None:
    """Problem 409 if `size` bytes more would leave less than `images.reserve` where uploads, and the database, lie."""
    system = os.statvfs(settings.home)
    if system.f_bavail * system.f_frsize - size < settings.images.reserve:
        raise no_room(size)


def no_room(size: int) -> Problem:
    detail = f"There is no room for {format_size(size)} beside what is reserved: come again, or ask an admin for room."
    return conflict("upload-no-room", detail)
