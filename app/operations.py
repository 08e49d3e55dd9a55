"""Long work: a row that is committed with the resource it works on, claimed by a worker, watched by a client.

    queued → running → succeeded | failed | cancelled        (running → queued: tried again later)

A claim takes a lease and a new `fence`; every later UPDATE of that worker names the fence, so that whoever lost the
lease (stopped, swapped out, cut off) changes nothing when it comes back.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import and_, exists, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from app.auth import Caller
from app.db import Database, change
from app.errors import Problem, conflict, not_found
from app.events import Actor, record
from app.ids import new_id
from app.models import Operation, User
from app.states import TRANSITIONS, now

OPEN = ("queued", "running")
FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Kind:
    """`lane`: fencing never waits behind data work. `steps` is what a dry run tells.

    `ends_it`: it takes its resource away, so that finding it gone already is success.
    """

    name: str
    lane: str
    steps: tuple[str, ...]
    cancellable: bool = False
    ends_it: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("volume.create", "data", ("make an empty backing of the volume's size, durably",)),
        Kind(
            "volume.clone", "data", ("copy the source's bytes (reflink where the pool can)", "extend to the size"), True
        ),
        Kind("volume.grow", "data", ("extend the backing", "drain, resize and re-admit the export if attached")),
        Kind("volume.revert", "data", ("copy the snapshot's bytes", "put them in the volume's place"), True),
        Kind(
            "volume.delete", "data", ("remove the backing", "delete the record and give the quota back"), ends_it=True
        ),
        Kind("volume.reset", "data", ("look at the backing and the export", "derive the state")),
        Kind("snapshot.create", "data", ("copy the volume's bytes (reflink where the pool can)",), True),
        Kind(
            "snapshot.delete", "data", ("remove the backing", "delete the record and give the quota back"), ends_it=True
        ),
        Kind("site.reconcile", "export", ("compare every layer with the database", "converge each volume")),
        Kind("attachment.attach", "export", ("make target and LUN", "bind the account", "admit the initiator")),
        Kind(
            "attachment.detach",
            "export",
            ("revoke initiator and account", "end its sessions and wait until none is left", "remove LUN and target"),
            ends_it=True,
        ),
    )
}


class Lost(Exception):
    """The operation is no longer this worker's; nothing of it may be written."""


class Cancelled(Exception):
    """A client asked for the operation's end and it can be ended here."""


def enqueue(
    session: Session, kind: str, caller: Caller | None, subject: UUID, resource: tuple[str, UUID], **parameters: Any
) -> Operation:
    """Add the operation to the transaction of its resource. `subject` is the volume (or snapshot) it occupies."""
    moment = now()
    operation = Operation(
        id=new_id(),
        kind=kind,
        lane=KINDS[kind].lane,
        state="queued",
        subject_id=subject,
        resource_kind=resource[0],
        resource_id=resource[1],
        principal_id=caller.id if caller else None,
        address=caller.address if caller else None,
        parameters=parameters,
        progress=0,
        cancel_requested=False,
        attempt=0,
        fence=0,
        not_before=moment,
        created_at=moment,
    )
    session.add(operation)
    session.flush()
    return operation


def find(session: Session, caller: Caller, identifier: UUID) -> Operation:
    operation = session.get(Operation, identifier)
    if operation is None or not (caller.is_admin or operation.principal_id == caller.id):
        raise not_found("operation", identifier)
    return operation


def cancel(session: Session, caller: Caller, identifier: UUID) -> Operation:
    """Ask for the end: at once while queued, at the next safe point while running."""
    operation = find(session, caller, identifier)
    if operation.state in FINAL:
        return operation
    if not KINDS[operation.kind].cancellable:
        raise conflict("not-cancellable", f"An operation {operation.kind} cannot be cancelled; it will end by itself.")
    asked = update(Operation).where(Operation.id == identifier, Operation.state.in_(OPEN))
    # A queued one is cancelled by the worker too: it knows what the resource needs undone.
    change(session, asked.values(cancel_requested=True))
    record(
        session,
        caller.actor,
        "operation.cancel",
        (operation.resource_kind, operation.resource_id),
        operation=str(identifier),
    )
    session.refresh(operation)
    return operation


#: Failures that a client can do something about; everything else of an operation is the service's own.
REFUSALS = frozenset({"pool-full", "cancelled", "backing-missing", "size-mismatch"})


def problem_of(operation: Operation) -> Problem:
    """What a client is told of a failed or cancelled operation it waited for."""
    code = operation.error_code or operation.state
    status = 409 if code in REFUSALS else 503 if code.startswith(("target-", "pool-")) else 500
    return Problem(status, code, operation.error_detail or f"The operation {operation.kind} was {operation.state}.")


# ---------------------------------------------------------------- the worker's side


def claim(database: Database, worker: str, lane: str, lease: float) -> Operation | None:
    """Take the oldest operation of the lane that is due and whose subject has none running, or whose lease is over."""
    with database.read() as session:
        if session.scalar(_claimable(lane, now())) is None:
            return None
    try:
        with database.write() as session:
            return _take(session, worker, lane, lease)
    except IntegrityError:
        return None  # another worker started one of the same subject between our look and our write


def _claimable(lane: str, moment: dt.datetime) -> Any:
    other = aliased(Operation)
    busy = exists().where(
        other.subject_id == Operation.subject_id, other.lane == lane, other.state == "running", other.id != Operation.id
    )
    due = and_(Operation.state == "queued", Operation.not_before <= moment, ~busy)
    orphaned = and_(Operation.state == "running", Operation.lease_until < moment)
    return select(Operation.id).where(Operation.lane == lane, or_(due, orphaned)).order_by(Operation.id).limit(1)


def _take(session: Session, worker: str, lane: str, lease: float) -> Operation | None:
    moment = now()
    chosen = _claimable(lane, moment)
    if session.get_bind().dialect.name == "postgresql":
        chosen = chosen.with_for_update(skip_locked=True)
    statement = (
        update(Operation)
        .where(Operation.id == chosen.scalar_subquery())
        .values(
            state="running",
            worker=worker,
            fence=Operation.fence + 1,
            attempt=Operation.attempt + 1,
            lease_until=moment + dt.timedelta(seconds=lease),
            started_at=moment,
        )
        .returning(Operation)
    )
    return session.scalars(statement, execution_options={"synchronize_session": False}).first()


def guarded(session: Session, operation: Operation, **values: Any) -> None:
    """Change the operation if it is still ours; raises Lost otherwise, and with it the whole transaction goes."""
    mine = (Operation.id == operation.id, Operation.fence == operation.fence, Operation.state == "running")
    if change(session, update(Operation).where(*mine).values(**values)) != 1:
        raise Lost(str(operation.id))


def finish(
    session: Session, operation: Operation, state: str, *, code: str | None = None, detail: str | None = None
) -> None:
    """End it; in the same transaction as what became of its resource."""
    assert "running" in TRANSITIONS[Operation][state]
    values: dict[str, Any] = {
        "state": state,
        "finished_at": now(),
        "error_code": code,
        "error_detail": detail,
        "message": None,
    }
    if state == "succeeded":
        values["progress"] = 100
    guarded(session, operation, lease_until=None, **values)


def put_back(session: Session, operation: Operation, delay: float, message: str, *, failed: bool) -> None:
    """To be tried again in `delay` seconds; its thread is free meanwhile. Only a try that `failed` counts."""
    due = now() + dt.timedelta(seconds=delay)
    attempt = operation.attempt if failed else operation.attempt - 1
    guarded(session, operation, state="queued", not_before=due, lease_until=None, message=message, attempt=attempt)


def renew(session: Session, worker: str, lease: float) -> None:
    """The worker lives: its operations stay its own for another `lease` seconds."""
    until = now() + dt.timedelta(seconds=lease)
    mine = (Operation.worker == worker, Operation.state == "running")
    change(session, update(Operation).where(*mine).values(lease_until=until))


def take_over(database: Database, host: str) -> int:
    """End the leases of earlier workers of this host. Only for who holds the host's worker lock: they are dead."""
    theirs = (Operation.worker.startswith(f"{host}:", autoescape=True), Operation.state == "running")
    over = now() - dt.timedelta(seconds=1)
    with database.write() as session:
        return change(session, update(Operation).where(*theirs).values(lease_until=over))


def actor_of(session: Session, operation: Operation) -> Actor:
    user = session.get(User, operation.principal_id) if operation.principal_id else None
    return Actor(user.name if user else "system", operation.address)
