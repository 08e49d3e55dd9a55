"""Volumes: backings made, copied, grown, put back and removed."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy import update
from sqlalchemy.orm import Session

from app import capacity
from app.db import change
from app.events import record
from app.models import Attachment, Operation, Snapshot, Volume
from app.operations import Cancelled, actor_of
from app.outside import TROUBLE
from app.states import now, transition
from app.steps.exports import export_of
from app.steps.job import Again, CloneNeedsDetach, Job, Settle
from iscsi.target import TargetBusy, TargetUnavailable
from pools import BackingMissing, PoolFull


def told(session: Session, operation: Operation, kind: str, volume_id: UUID, **detail: object) -> None:
    record(session, actor_of(operation), kind, ("volume", volume_id), operation=str(operation.id), **detail)


def broken(session: Session, operation: Operation, error: Exception) -> None:
    transition(session, Volume, operation.resource_id, "error", error=str(error), new_size=None)
    told(session, operation, "volume.error", operation.resource_id, cause=str(error))


def release_source(session: Session, model: type[Volume] | type[Snapshot], identifier: UUID) -> None:
    """One copy less is being made from it."""
    counted = update(model).where(model.id == identifier).values(readers=model.readers - 1)
    change(session, counted)


# ---------------------------------------------------------------- create, clone


def create(job: Job) -> Settle:
    volume = job.load(Volume, state="creating")
    with job.lock():
        job.pool(volume.pool).create(volume.id, volume.size)

    def settle(session: Session) -> None:
        transition(session, Volume, volume.id, "available", error=None)
        told(session, job.operation, "volume.created", volume.id)

    return settle


create_failed = broken


def clone(job: Job) -> Settle:
    volume = job.load(Volume, state="creating")
    assert volume.origin_id is not None
    pool = job.pool(volume.pool)
    copy = pool.clone_snapshot if volume.origin_kind == "snapshot" else pool.clone_volume
    with job.lock():
        if volume.origin_kind == "volume":
            job.copyable(volume.origin_id, CloneNeedsDetach)
        copy(volume.origin_id, volume.id, volume.size, job.progress)

    def settle(session: Session) -> None:
        _release_origin(session, volume)
        transition(session, Volume, volume.id, "available", error=None)
        told(session, job.operation, "volume.created", volume.id, origin=str(volume.origin_id))

    return settle


def remove_copy(job: Job) -> None:
    volume = job.load(Volume)
    job.pool(volume.pool).delete_volume(volume.id)


def _release_origin(session: Session, volume: Volume) -> None:
    assert volume.origin_id is not None
    release_source(session, Snapshot if volume.origin_kind == "snapshot" else Volume, volume.origin_id)


def clone_failed(session: Session, operation: Operation, error: Exception) -> None:
    """A cancelled copy leaves nothing behind; a failed one leaves a volume in error that says why."""
    volume = session.get(Volume, operation.resource_id)
    if volume is None:
        return
    _release_origin(session, volume)
    if isinstance(error, Cancelled):
        forget(session, operation, volume)
    else:
        broken(session, operation, error)


def forget(session: Session, operation: Operation, volume: Volume) -> None:
    """The record goes, the quota comes back."""
    capacity.release(session, volume.owner_id, volume.pool, max(volume.size, volume.new_size or 0))
    change(session, delete_rows(Attachment).where(Attachment.volume_id == volume.id))
    change(session, delete_rows(Volume).where(Volume.id == volume.id))
    told(session, operation, "volume.deleted", volume.id, name=volume.name)


# ---------------------------------------------------------------- grow, revert


def grow(job: Job) -> Settle:
    """Extend the backing first; then, if it is exported, the target lets the initiators see the new size."""
    volume = job.load(Volume)
    size = int(job.operation.parameters["size"])
    pool = job.pool(volume.pool)
    with job.lock(), job.lock(lane="export"):  # an export that is being made must not see two sizes
        pool.resize(volume.id, size)
        _grow_export(job, volume.id)

    def settle(session: Session) -> None:
        values = {"size": size, "new_size": None, "version": Volume.version + 1, "updated_at": now()}
        grown = update(Volume).where(Volume.id == volume.id, Volume.new_size == size).values(**values)
        change(session, grown)
        told(session, job.operation, "volume.grown", volume.id, size=size)

    return settle


def _grow_export(job: Job, volume_id: UUID) -> None:
    """The bytes are there already, so this is tried until it is done: there is no way back."""
    try:
        export = export_of(job.outside, volume_id)
        if export is not None:
            job.outside.target.grow(export)
    except TROUBLE as error:
        raise Again(0.5, f"waiting to resize the export: {error}") from error


def grow_failed(session: Session, operation: Operation, error: Exception) -> None:
    """The volume keeps its size and its state; what was charged for the growth is given back."""
    volume = session.get(Volume, operation.resource_id)
    if volume is None or volume.new_size is None:
        return
    growth, volume.new_size = volume.new_size - volume.size, None
    session.flush()  # the volume first, then what is charged for it: the order in which everyone locks these rows
    capacity.release(session, volume.owner_id, volume.pool, growth, count=0)
    told(session, operation, "volume.grow-failed", volume.id, cause=str(error))


def revert(job: Job) -> Settle:
    volume = job.load(Volume, state="reverting")
    snapshot = UUID(job.operation.parameters["snapshot"])
    # An earlier try may have put the bytes in place already: from the second one on there is no way back.
    first = job.operation.fence == 1
    with job.lock(cancellable=first):
        job.pool(volume.pool).revert(volume.id, snapshot, job.progress if first else job.report)

    def settle(session: Session) -> None:
        release_source(session, Snapshot, snapshot)
        transition(session, Volume, volume.id, "available", error=None)
        told(session, job.operation, "volume.reverted", volume.id, snapshot=str(snapshot))

    return settle


def revert_failed(session: Session, operation: Operation, error: Exception) -> None:
    """The old bytes are put aside only when the new ones are complete: after a cancel, or when there was no room for
    them, the volume is as it was."""
    release_source(session, Snapshot, UUID(operation.parameters["snapshot"]))
    if isinstance(error, (Cancelled, PoolFull)):
        transition(session, Volume, operation.resource_id, "available")
        told(session, operation, "volume.revert-failed", operation.resource_id, cause=str(error))
    else:
        broken(session, operation, error)


# ---------------------------------------------------------------- delete, reset


def delete(job: Job) -> Settle:
    volume = job.load(Volume, state="deleting")
    with job.lock():
        with job.lock(lane="export"):
            _remove_export(job, volume.id)
        job.pool(volume.pool).delete_volume(volume.id)
    job.outside.forget_locks(volume.id)
    return lambda session: forget(session, job.operation, session.get_one(Volume, volume.id))


def _remove_export(job: Job, volume_id: UUID) -> None:
    """Nobody is attached, so there should be none; but its bytes go only when the target has said so."""
    try:
        job.outside.target.remove(volume_id)
    except (TargetUnavailable, TargetBusy) as error:
        raise Again(0.5, f"waiting for the target: {error}") from error


delete_failed = broken


def reset(job: Job) -> Settle:
    """Derive the state from what is there: the backing, its size, and who holds the volume."""
    volume = job.load(Volume)
    with job.lock():
        try:
            backing = job.pool(volume.pool).backing(volume.id)
            missing = None if backing.size >= volume.size else f"the backing has {backing.size} of {volume.size} bytes"
        except BackingMissing as error:
            missing = str(error)

    def settle(session: Session) -> None:
        held = session.get_one(Volume, volume.id, populate_existing=True).held_mode is not None
        state = "error" if missing else "in-use" if held else "available"
        # A state that belongs to an operation still to come is that operation's to end.
        settled = Volume.state.in_(("available", "in-use", "error"))
        transition(session, Volume, volume.id, state, settled, error=missing)
        told(session, job.operation, "volume.state-reset", volume.id, state=state, error=missing)

    return settle


def reset_failed(session: Session, operation: Operation, error: Exception) -> None:
    told(session, operation, "volume.reset-failed", operation.resource_id, cause=str(error))
