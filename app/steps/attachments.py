"""Attachments: exports built so that nothing leaks, and the fence that takes them down."""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import case, exists, update
from sqlalchemy.orm import Session

from app import attachments
from app.db import change
from app.events import SYSTEM, record
from app.models import Attachment, Operation, Volume
from app.operations import actor_of
from app.outside import Outside
from app.states import now, transition
from app.steps.exports import admitted_logins, export_of
from app.steps.job import Again, Job, Settle, Vanished
from iscsi.target import Login, TargetBusy, TargetError, TargetUnavailable
from iscsi.target import Session as TargetSession

#: How long a thread looks again and again for the last session, before it lets the operation be tried again.
PATIENCE = 1.0


def attach(job: Job) -> Settle:
    attachment = job.load(Attachment, state="attaching")
    with job.lock():
        export = export_of(job.outside, attachment.volume_id)
        if export is None:
            raise Vanished
        try:
            job.outside.target.ensure_export(export)
        except (TargetUnavailable, TargetBusy) as error:
            raise _soon(job, error) from error

    def settle(session: Session) -> None:
        if transition(session, Attachment, attachment.id, "attached", attached_at=now()):
            attachments.touch(session, attachment)
            resource = ("attachment", attachment.id)
            record(
                session,
                actor_of(job.operation),
                "attachment.attached",
                resource,
                volume=str(attachment.volume_id),
            )

    return settle


def _soon(job: Job, error: TargetError) -> Exception:
    """The target is being restarted, or not done with what was there: wait for it, but not for ever."""
    waited = (now() - job.operation.created_at).total_seconds()
    return Again(0.2, f"waiting for the target: {error}") if waited < 60 else error


def attach_failed(session: Session, operation: Operation, error: Exception) -> None:
    """Whatever was made is taken down again, by the fence."""
    attachment = session.get(Attachment, operation.resource_id)
    if attachment is not None:
        attachment.error = str(error)
        session.flush()
        attachments.revoke(session, attachment, "attach failed")


def detach(job: Job) -> Settle:
    """Revoke, end the sessions, look again until none is left, then remove LUN and target.

    A session with a write in flight stays listed, and that write still lands: the volume is nobody else's until then,
    however long it takes. The target's word for the removal is the receipt.
    """
    attachment = job.load(Attachment, state="detaching")
    with job.lock():
        try:
            others = admitted_logins(job.outside, attachment.volume_id)
            drain(job.outside, attachment, others)
            if not others:
                job.outside.target.remove(attachment.volume_id)
        except TargetUnavailable as error:
            raise Again(0.2, "waiting for the target") from error
        except TargetBusy as error:  # a session came, or was seen, only now
            raise Again(0.2, str(error)) from error

    def settle(session: Session) -> None:
        release(session, attachment)
        receipt = {"initiator": attachment.initiator, "sessions_left": 0, "target_removed": not others}
        resource = ("attachment", attachment.id)
        volume = str(attachment.volume_id)
        record(session, actor_of(job.operation), "attachment.detached", resource, volume=volume, **receipt)

    return settle


def drain(outside: Outside, attachment: Attachment, others: Collection[Login]) -> None:
    """Until the target lists no session of the revoked; Again when that takes longer than a thread should wait."""
    deadline = time.monotonic() + PATIENCE
    left = outside.target.drain(attachment.volume_id, keep=others)
    while left:
        if time.monotonic() > deadline:
            raise Again(0.2, _waiting_for(left))
        time.sleep(0.01)
        left = outside.target.drain(attachment.volume_id, keep=others)


def _waiting_for(left: list[TargetSession]) -> str:
    names = ", ".join(f"{session.initiator} ({session.address or 'address not known'})" for session in left)
    return f"waiting for the last writes of {names}"


def release(session: Session, attachment: Attachment) -> None:
    """detaching → detached; the volume is free when no other attachment holds it."""
    transition(session, Attachment, attachment.id, "detached", held_mode=None, detached_at=now())
    held = exists().where(Attachment.volume_id == attachment.volume_id, Attachment.held_mode.is_not(None))
    freed = (
        update(Volume)
        .where(Volume.id == attachment.volume_id, ~held)
        .values(
            held_mode=None,
            state=case((Volume.state == "in-use", "available"), else_=Volume.state),
            error=case((Volume.state == "in-use", None), else_=Volume.error),  # its export's trouble went with it
            version=Volume.version + 1,
            updated_at=now(),
        )
    )
    change(session, freed)


def detach_failed(session: Session, operation: Operation, error: Exception) -> None:
    """It stays `detaching`: nobody else attaches until an admin or the next reconcile has the fence through."""
    record(session, SYSTEM, "attachment.detach-failed", ("attachment", operation.resource_id), cause=str(error))
