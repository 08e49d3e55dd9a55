"""Snapshots: a volume's bytes copied aside, and removed again."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy.orm import Session

from app import capacity
from app.db import change
from app.events import record
from app.models import Operation, Snapshot, Volume
from app.operations import Cancelled, actor_of
from app.states import transition
from app.steps.job import Job, Settle, SnapshotNeedsDetach
from app.steps.volumes import release_source


def _told(session: Session, operation: Operation, kind: str, **detail: object) -> None:
    resource = ("snapshot", operation.resource_id)
    record(session, actor_of(operation), kind, resource, operation=str(operation.id), **detail)


def create(job: Job) -> Settle:
    snapshot = job.load(Snapshot, state="creating")
    with job.lock():
        job.copyable(snapshot.volume_id, SnapshotNeedsDetach)
        job.pool(snapshot.pool).snapshot(snapshot.volume_id, snapshot.id, job.progress)

    def settle(session: Session) -> None:
        release_source(session, Volume, snapshot.volume_id)
        transition(session, Snapshot, snapshot.id, "available", error=None)
        _told(session, job.operation, "snapshot.created", volume=str(snapshot.volume_id))

    return settle


def remove_copy(job: Job) -> None:
    snapshot = job.load(Snapshot)
    job.pool(snapshot.pool).delete_snapshot(snapshot.id)


def create_failed(session: Session, operation: Operation, error: Exception) -> None:
    release_source(session, Volume, operation.subject_id)
    if isinstance(error, Cancelled):
        _forget(session, operation, operation.resource_id)
    else:
        _broken(session, operation, error)


def delete(job: Job) -> Settle:
    snapshot = job.load(Snapshot, state="deleting")
    with job.lock():
        job.pool(snapshot.pool).delete_snapshot(snapshot.id)
    job.outside.forget_locks(snapshot.id)
    return lambda session: _forget(session, job.operation, snapshot.id)


def _forget(session: Session, operation: Operation, identifier: UUID) -> None:
    snapshot = session.get(Snapshot, identifier)
    if snapshot is None:
        return
    capacity.release(session, snapshot.owner_id, snapshot.pool, snapshot.size)
    change(session, delete_rows(Snapshot).where(Snapshot.id == identifier))
    _told(session, operation, "snapshot.deleted", name=snapshot.name)


def _broken(session: Session, operation: Operation, error: Exception) -> None:
    transition(session, Snapshot, operation.resource_id, "error", error=str(error))
    _told(session, operation, "snapshot.error", cause=str(error))


delete_failed = _broken
