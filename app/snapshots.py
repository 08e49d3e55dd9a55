"""Snapshots: a volume's bytes at one moment, kept beside it."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ColumnElement
from sqlalchemy.orm import Session, joinedload

from app import capacity, operations, volumes
from app.auth import Caller, require_owner
from app.config import Settings
from app.errors import Problem, conflict
from app.events import record
from app.ids import new_id
from app.models import Operation, Snapshot
from app.paging import Page, page
from app.schemas import SnapshotCreate, SnapshotFilter
from app.states import now, transition

find = volumes.find_snapshot


def list_page(session: Session, caller: Caller, wanted: SnapshotFilter) -> Page[Snapshot]:
    filters: list[ColumnElement[bool]] = [] if caller.sees_all else [Snapshot.owner_id == caller.id]
    if wanted.name is not None:
        filters.append(Snapshot.name == wanted.name)
    if wanted.volume is not None:
        filters.append(Snapshot.volume_id == wanted.volume)
    options = [joinedload(Snapshot.owner)]
    return page(session, Snapshot, limit=wanted.limit, cursor=wanted.next, branches=[filters], options=options)


def create(session: Session, settings: Settings, caller: Caller, volume_id: UUID, body: SnapshotCreate) -> Operation:
    """Charged to the volume's owner, whoever asks."""
    volume = volumes.find(session, caller, volume_id)
    require_owner(caller, volume)
    volumes.hold_for_copy(session, volume, "snapshot-needs-detach")
    capacity.reserve(session, settings, volume.owner_id, volume.pool, volume.size)
    moment = now()
    snapshot = Snapshot(
        id=new_id(),
        name=body.name,
        volume_id=volume.id,
        size=volume.size,
        state="creating",
        owner_id=volume.owner_id,
        pool=volume.pool,
        readers=0,
        version=1,
        created_at=moment,
        updated_at=moment,
    )
    session.add(snapshot)
    session.flush()
    record(session, caller.actor, "snapshot.create", ("snapshot", snapshot.id), volume=str(volume.id), name=body.name)
    return operations.enqueue(session, "snapshot.create", caller, volume.id, ("snapshot", snapshot.id))


def request_delete(session: Session, caller: Caller, identifier: UUID, version: int | None) -> Operation:
    snapshot = find(session, caller, identifier)
    require_owner(caller, snapshot)
    unchanged = [] if version is None else [Snapshot.version == version]
    if not transition(session, Snapshot, snapshot.id, "deleting", Snapshot.readers == 0, *unchanged):
        session.refresh(snapshot)
        if version is not None and snapshot.version != version:
            raise Problem(412, "precondition-failed", "The snapshot has changed since you read it; read it again.")
        if snapshot.readers:
            raise conflict("snapshot-busy", f"Snapshot {snapshot.id} is being copied; wait for that, or cancel it.")
        raise conflict("snapshot-not-available", f"Snapshot {snapshot.id} is {snapshot.state}; it must be available.")
    record(session, caller.actor, "snapshot.delete", ("snapshot", snapshot.id), volume=str(snapshot.volume_id))
    return operations.enqueue(session, "snapshot.delete", caller, snapshot.id, ("snapshot", snapshot.id))
