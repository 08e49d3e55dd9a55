"""Volumes: check, then record the intention. Nothing here touches anything but the database."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session, joinedload, selectinload

from app import accounts, capacity, operations
from app.auth import Caller, groups_of, may_see, require_owner
from app.config import Settings
from app.db import change
from app.errors import Problem, conflict, invalid, not_found
from app.events import record
from app.ids import new_id
from app.models import Counter, Group, Operation, Pool, Share, Snapshot, User, Volume
from app.paging import Page, page
from app.schemas import ShareUpdate, VolumeCreate, VolumeFilter, VolumeUpdate
from app.states import now, transition
from blockdev.units import format_size

SHOWN = (joinedload(Volume.owner), selectinload(Volume.attachments))


def find(session: Session, caller: Caller, identifier: UUID) -> Volume:
    """The volume if the caller may see it; Problem 404 otherwise."""
    query = select(Volume).where(Volume.id == identifier, may_see(caller)).options(*SHOWN)
    volume = session.scalar(query.execution_options(populate_existing=True))
    if volume is None:
        raise not_found("volume", identifier)
    return volume


def list_page(session: Session, caller: Caller, wanted: VolumeFilter) -> Page[Volume]:
    """Seen as `auth.may_see` says, by branches that each use an index."""
    filters = _filters(wanted, Volume.name, Volume.state)
    branches = [filters]
    if not caller.sees_all:
        shared = Volume.id.in_(select(Share.volume_id).where(groups_of(caller)))
        # Few volumes are shared with one: their ids lead, and no index on all volumes of that state or name may.
        unindexed = _filters(wanted, Volume.name.concat(""), Volume.state.concat(""))
        branches = [
            [Volume.owner_id == caller.id, *filters],
            [Volume.visibility == "public", *filters],
            [shared, *unindexed],
        ]
    return page(session, Volume, limit=wanted.limit, cursor=wanted.next, branches=branches, options=SHOWN)


def _filters(wanted: VolumeFilter, name: Any, state: Any) -> list[ColumnElement[bool]]:
    filters = []
    if wanted.name is not None:
        filters.append(name == wanted.name)
    if wanted.state is not None:
        filters.append(state == wanted.state)
    if wanted.owner is not None:
        filters.append(Volume.owner_id.in_(select(User.id).where(User.name == wanted.owner)))
    return filters


# ---------------------------------------------------------------- create, clone


def create(session: Session, settings: Settings, caller: Caller, body: VolumeCreate) -> Operation:
    """Record a new volume, empty or copied from one snapshot or volume, and the operation that makes it."""
    if body.snapshot is not None and body.volume is not None:
        raise invalid("/snapshot", "one-source", "A volume is copied from a snapshot or from a volume, not from both.")
    source = _source(session, caller, body)
    pool = _pool_of_new(session, settings, body, source)
    size = capacity.rounded(session, pool, _size_of_new(settings, body, source))
    capacity.reserve(session, settings, caller.id, pool, size)
    origin = None if source is None else ("snapshot" if isinstance(source, Snapshot) else "volume", source.id)
    volume = insert(session, caller, body, size, pool, origin)
    record(session, caller.actor, "volume.create", ("volume", volume.id), name=volume.name, size=size, pool=pool)
    kind = "volume.create" if source is None else "volume.clone"
    return operations.enqueue(session, kind, caller, volume.id, ("volume", volume.id))


def _source(session: Session, caller: Caller, body: VolumeCreate) -> Volume | Snapshot | None:
    if body.volume is not None:
        volume = find(session, caller, body.volume)
        hold_for_copy(session, volume, "clone-needs-detach")
        return volume
    if body.snapshot is not None:
        return hold_snapshot(session, find_snapshot(session, caller, body.snapshot))
    return None


def hold_snapshot(session: Session, snapshot: Snapshot) -> Snapshot:
    """Count a reader in, so that the bytes stay."""
    held = update(Snapshot).where(Snapshot.id == snapshot.id, Snapshot.state == "available")
    counted = held.values(readers=Snapshot.readers + 1)
    if change(session, counted) == 0:
        raise conflict("snapshot-not-available", f"Snapshot {snapshot.id} is {snapshot.state}; it must be available.")
    return snapshot


def find_snapshot(session: Session, caller: Caller, identifier: UUID) -> Snapshot:
    snapshot = session.get(Snapshot, identifier, options=[joinedload(Snapshot.owner)], populate_existing=True)
    if snapshot is None or not (caller.sees_all or snapshot.owner_id == caller.id):
        raise not_found("snapshot", identifier)
    return snapshot


def hold_for_copy(session: Session, volume: Volume, needs_detach: str) -> None:
    """Count a reader in, so that the bytes stay and, where copies are not atomic, nobody starts to write them."""
    live = select(Pool.live_clone).where(Pool.name == Volume.pool).scalar_subquery()
    unwritten = or_(Volume.held_mode.is_(None), Volume.held_mode == "ro", live)
    held = (
        update(Volume)
        .where(Volume.id == volume.id, Volume.state.in_(("available", "in-use")), Volume.new_size.is_(None), unwritten)
        .values(readers=Volume.readers + 1)
    )
    held_now = change(session, held) == 1
    session.refresh(volume)  # now that it cannot change: it may have grown since we found it
    if held_now:
        return
    if volume.new_size is not None:
        raise _busy(volume)
    if volume.held_mode == "rw":
        raise conflict(
            needs_detach,
            f"Volume {volume.id} is attached for writing, and its pool cannot copy a volume in one instant: "
            "detach it first.",
        )
    raise not_available(volume)


def not_available(volume: Volume) -> Problem:
    if volume.state in ("available", "in-use"):  # it is again: what stood in the way has ended since we looked
        return conflict("volume-busy", f"Volume {volume.id} was being changed; try again.")
    return conflict("volume-not-available", f"Volume {volume.id} is {volume.state}; it must be available.")


def _size_of_new(settings: Settings, body: VolumeCreate, source: Volume | Snapshot | None) -> int:
    size = body.size if body.size is not None else source.size if source is not None else None
    if size is None:
        raise invalid("/size", "missing", "Say how large the volume is to be, in bytes.")
    if source is not None and size < source.size:
        raise conflict("size-too-small", f"The copy needs at least its source's {source.size} bytes.")
    check_maximum(settings, size)
    return size


def check_maximum(settings: Settings, size: int) -> None:
    if size > settings.volumes.max_size:
        raise invalid("/size", "too-large", f"The largest volume here is {format_size(settings.volumes.max_size)}.")


def _pool_of_new(session: Session, settings: Settings, body: VolumeCreate, source: Volume | Snapshot | None) -> str:
    if source is not None:
        if body.pool not in (None, source.pool):
            raise conflict("pool-mismatch", f"A copy lies in its source's pool, {source.pool}.")
        return source.pool
    return pool_named(session, settings, body.pool)


def pool_named(session: Session, settings: Settings, name: str | None) -> str:
    """The pool of that name, or the default one; Problem 404."""
    name = name or settings.default_pool
    if session.get(Pool, name) is None:
        raise not_found("pool", name)
    return name


def insert(
    session: Session, caller: Caller, body: VolumeCreate, size: int, pool: str, origin: tuple[str, UUID] | None
) -> Volume:
    """The record of a new volume; `origin` is the kind and the id of what it is a copy of."""
    moment = now()
    volume = Volume(
        id=new_id(),
        name=body.name,
        size=size,
        state="creating",
        owner_id=caller.id,
        visibility=body.visibility,
        pool=pool,
        origin_kind=origin and origin[0],
        origin_id=origin and origin[1],
        readers=0,
        tid=_next_tid(session),
        version=1,
        created_at=moment,
        updated_at=moment,
    )
    session.add(volume)
    session.flush()
    return volume


def _next_tid(session: Session) -> int:
    """The target's number: part of a SCSI designator, so it is never given twice."""
    counted = update(Counter).where(Counter.name == "tid").values(value=Counter.value + 1).returning(Counter.value)
    return session.scalars(counted).one()


# ---------------------------------------------------------------- change, delete


def update_record(
    session: Session, settings: Settings, caller: Caller, identifier: UUID, body: VolumeUpdate, version: int | None
) -> Operation | None:
    """Rename, publish, grow. Growing is an operation; the rest is done at once. `version`: If-Match, or None."""
    volume = find(session, caller, identifier)
    require_owner(caller, volume)
    plain = {name: getattr(body, name) for name in ("name", "visibility") if name in body.model_fields_set}
    _bump(session, volume, version, **plain)
    session.refresh(volume)  # its row is ours from here on: it may have grown since we found it
    if plain:
        record(session, caller.actor, "volume.update", ("volume", volume.id), **plain)
    if body.size is None:
        return None
    if body.size < volume.size:
        raise conflict("shrink-refused", f"The volume has {volume.size} bytes and can only grow: shrinking loses data.")
    size = capacity.rounded(session, volume.pool, body.size)
    return _grow(session, settings, caller, volume, size) if size > volume.size else None


def _bump(session: Session, volume: Volume, version: int | None, **values: object) -> None:
    """Change the record if it still is the `version` the client saw (RFC 9110 §13.1.1)."""
    unchanged = () if version is None else (Volume.version == version,)
    statement = (
        update(Volume)
        .where(Volume.id == volume.id, Volume.state != "deleting", *unchanged)
        .values(**values, version=Volume.version + 1, updated_at=now())
    )
    if change(session, statement) == 0:
        session.refresh(volume)
        if volume.state == "deleting":
            raise not_available(volume)
        raise Problem(412, "precondition-failed", "The volume has changed since you read it; read it again.")


def _grow(session: Session, settings: Settings, caller: Caller, volume: Volume, size: int) -> Operation:
    check_maximum(settings, size)
    planned = (
        update(Volume)
        .where(
            Volume.id == volume.id,
            Volume.state.in_(("available", "in-use")),
            Volume.new_size.is_(None),
            Volume.size < size,
            Volume.readers == 0,
        )
        .values(new_size=size)
    )
    if change(session, planned) == 0:
        session.refresh(volume)
        raise _busy(volume)
    capacity.reserve(session, settings, volume.owner_id, volume.pool, size - volume.size, count=0)
    record(session, caller.actor, "volume.grow", ("volume", volume.id), size=size, before=volume.size)
    return operations.enqueue(session, "volume.grow", caller, volume.id, ("volume", volume.id), size=size)


def _busy(volume: Volume) -> Problem:
    if volume.readers:
        return conflict("volume-busy", f"Volume {volume.id} is being copied; wait for that, or cancel it.")
    if volume.new_size is not None:
        return conflict("volume-busy", f"Volume {volume.id} is being grown; wait for that.")
    if volume.held_mode is not None:
        return conflict("volume-in-use", f"Volume {volume.id} is attached ({volume.held_mode}); detach it first.")
    return not_available(volume)


def request_delete(session: Session, caller: Caller, identifier: UUID, version: int | None) -> Operation:
    volume = find(session, caller, identifier)
    require_owner(caller, volume)
    unused = [Volume.held_mode.is_(None), Volume.readers == 0, Volume.new_size.is_(None)]
    unchanged = [] if version is None else [Volume.version == version]
    if not transition(session, Volume, volume.id, "deleting", *unused, *unchanged):
        session.refresh(volume)
        if volume.state == "deleting":  # somebody was first: this caller's own operation ends with theirs
            return operations.enqueue(session, "volume.delete", caller, volume.id, ("volume", volume.id))
        if version is not None and volume.version != version:
            raise Problem(412, "precondition-failed", "The volume has changed since you read it; read it again.")
        raise _busy(volume)
    record(session, caller.actor, "volume.delete", ("volume", volume.id), name=volume.name, size=volume.size)
    return operations.enqueue(session, "volume.delete", caller, volume.id, ("volume", volume.id))


def revert(session: Session, caller: Caller, identifier: UUID, snapshot_id: UUID) -> Operation:
    """Put a snapshot's bytes in the place of a detached volume's."""
    volume = find(session, caller, identifier)
    require_owner(caller, volume)
    snapshot = find_snapshot(session, caller, snapshot_id)
    if snapshot.volume_id != volume.id:
        raise conflict("snapshot-of-another", f"Snapshot {snapshot.id} is not one of volume {volume.id}.")
    capacity.require_room(session, volume.pool)
    unused = (Volume.held_mode.is_(None), Volume.readers == 0, Volume.new_size.is_(None))
    if not transition(session, Volume, volume.id, "reverting", *unused):
        session.refresh(volume)
        raise _busy(volume)
    hold_snapshot(session, snapshot)
    record(session, caller.actor, "volume.revert", ("volume", volume.id), snapshot=str(snapshot.id))
    return operations.enqueue(
        session, "volume.revert", caller, volume.id, ("volume", volume.id), snapshot=str(snapshot.id)
    )


def reset_state(session: Session, caller: Caller, identifier: UUID) -> Operation:
    caller.require_admin()
    volume = find(session, caller, identifier)
    record(session, caller.actor, "volume.reset-state", ("volume", volume.id), before=volume.state)
    return operations.enqueue(session, "volume.reset", caller, volume.id, ("volume", volume.id))


# ---------------------------------------------------------------- shares


def shares(session: Session, caller: Caller, identifier: UUID) -> list[tuple[str, str]]:
    """Group and mode of each share, by name."""
    volume = find(session, caller, identifier)
    require_owner(caller, volume)
    rows = session.execute(
        select(Group.name, Share.mode)
        .join(Share, Share.group_id == Group.id)
        .where(Share.volume_id == volume.id)
        .order_by(Group.name)
    )
    return [(name, mode) for name, mode in rows]


def share(session: Session, caller: Caller, identifier: UUID, body: ShareUpdate) -> None:
    volume = find(session, caller, identifier)
    require_owner(caller, volume)
    group = accounts.find_group(session, caller, body.group)
    session.merge(Share(volume_id=volume.id, group_id=group.id, mode=body.mode))
    record(session, caller.actor, "volume.share", ("volume", volume.id), group=group.name, mode=body.mode)


def unshare(session: Session, caller: Caller, identifier: UUID, group_name: str) -> None:
    volume = find(session, caller, identifier)
    require_owner(caller, volume)
    group = session.scalar(select(Group).where(Group.name == group_name))
    gone = delete(Share).where(Share.volume_id == volume.id, Share.group_id == (group.id if group else None))
    if change(session, gone) == 0:
        raise not_found("share", f"of volume {volume.id} with group {group_name}")
    record(session, caller.actor, "volume.unshare", ("volume", volume.id), group=group_name)
