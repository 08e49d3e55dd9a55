"""Long work: a row that is committed with the resource it works on, claimed by a worker, watched by a client.

    queued → running → succeeded | failed | cancelled        (running → queued: tried again later)

A claim takes a lease and a new `fence`; every later UPDATE of that worker names the fence, so that whoever lost the
lease (stopped, swapped out, cut off) changes nothing when it comes back.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Update, and_, bindparam, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from app.auth import Caller
from app.db import Database, change
from app.errors import Problem, conflict, not_found
from app.events import SYSTEM, Actor, record
from app.ids import new_id
from app.models import Operation, OperationWatcher
from app.states import TRANSITIONS, now

LANES = ("data", "export", "image")
OPEN = ("queued", "running")
#: The share of who may have all there is.
EVERYTHING = 1 << 30
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


KEEP = ("look at what it claims to be, in a sandbox", "make a fresh qcow2 of it", "commit it to the cache")
FETCH = ("find what is said about the image", "judge it by the policy", "download and verify it", *KEEP)
FROM_IMAGE = ("wait for the image", "make the pool's golden copy of it, once", "clone it", "extend to the size")

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
        Kind("site.reconcile", "data", ("compare every layer with the database", "converge each volume")),
        Kind("volume.from-image", "data", FROM_IMAGE, True),
        Kind("image.fetch", "image", FETCH, True),
        Kind("image.from-volume", "image", ("read the source's bytes", *KEEP), True),
        Kind("image.commit", "image", ("verify what was sent", *KEEP), True),
        Kind("image.join", "data", ("judge the image by the policy of today",)),
        Kind("image.judge", "image", ("find what is said about the image", "judge each entry by the policy"), True),
        Kind("image.scrub", "image", ("read the image again", "set it aside and fetch it anew if it is rotten")),
        Kind(
            "image.delete",
            "data",
            ("remove the file, and its golden copies, with the last record of it", "delete the record"),
            ends_it=True,
        ),
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
        actor=caller.name if caller else SYSTEM.name,
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


def watch(session: Session, operation: Operation, caller: Caller) -> None:
    """The caller has a part in the operation: may look at it, and is waited for before it is cancelled."""
    entry = OperationWatcher(operation_id=operation.id, user_id=caller.id, waiting=True)
    session.merge(entry)
    # Somebody wants it now, whatever those before said.
    change(session, update(Operation).where(Operation.id == operation.id).values(cancel_requested=False))


def watched_by(caller: Caller) -> ColumnElement[bool]:
    """Operations that the caller joined."""
    mine = select(OperationWatcher.operation_id).where(OperationWatcher.user_id == caller.id)
    return Operation.id.in_(mine)


def find(session: Session, caller: Caller, identifier: UUID) -> Operation:
    operation = session.get(Operation, identifier)
    if operation is None or not (caller.is_admin or _has_part(session, caller, operation)):
        raise not_found("operation", identifier)
    return operation


def _has_part(session: Session, caller: Caller, operation: Operation) -> bool:
    if operation.principal_id == caller.id:
        return True
    return session.get(OperationWatcher, (operation.id, caller.id)) is not None


def cancel(session: Session, caller: Caller, identifier: UUID) -> Operation:
    """Ask for the end: at once while queued, at the next safe point while running.

    Of several who wait for it each ends only their own part, and an admin all of it.
    """
    operation = find(session, caller, identifier)
    if operation.state in FINAL:
        return operation
    if not KINDS[operation.kind].cancellable:
        raise conflict("not-cancellable", f"An operation {operation.kind} cannot be cancelled; it will end by itself.")
    resource = (operation.resource_kind, operation.resource_id)
    record(session, caller.actor, "operation.cancel", resource, operation=str(identifier))
    if not _others_wait(session, caller, operation):
        asked = update(Operation).where(Operation.id == identifier, Operation.state.in_(OPEN))
        # A queued one is cancelled by the worker too: it knows what the resource needs undone.
        change(session, asked.values(cancel_requested=True))
    session.refresh(operation)
    return operation


def _others_wait(session: Session, caller: Caller, operation: Operation) -> bool:
    """Whether somebody else still waits for it, now that the caller no longer does."""
    # The operation's row is held, so that of the last two who leave at once the second sees that the first has left.
    session.scalar(select(Operation.id).where(Operation.id == operation.id).with_for_update())
    mine = (OperationWatcher.operation_id == operation.id, OperationWatcher.user_id == caller.id)
    change(session, update(OperationWatcher).where(*mine).values(waiting=False))
    if caller.is_admin:
        return False
    waiting = (OperationWatcher.operation_id == operation.id, OperationWatcher.waiting)
    return session.scalar(select(OperationWatcher.user_id).where(*waiting).limit(1)) is not None


#: Failures that a client can do something about; everything else of an operation is the service's own.
REFUSALS = frozenset(
    {
        "pool-full",
        "cancelled",
        "backing-missing",
        "size-mismatch",
        "size-too-large",
        "snapshot-needs-detach",
        "clone-needs-detach",
        "changed-meanwhile",
        "quota-exceeded",
        "size-too-small",
    }
)
#: Refusals of images, by the codes of `imagecache.errors`, which the API's processes do not load.
IMAGE_REFUSALS = frozenset(
    {
        "image-failed",
        "bad-reference",
        "no-image-entry",
        "bad-metadata",
        "bad-signature",
        "bad-checksum-file",
        "policy-refused",
        "bad-url",
        "address-refused",
        "too-many-redirects",
        "wrong-digest",
        "wrong-size",
        "truncated",
        "bad-compression",
        "image-too-large",
        "bad-format",
        "has-backing-file",
        "has-data-file",
        "has-internal-snapshots",
        "encrypted-image",
        "unknown-features",
        "damaged-image",
        "image-not-available",
    }
)
#: Likewise, where it lies at the service or at the image's origin.
UNWELL = frozenset({"unreachable", "sandbox-failed", "image-cache-full", "image-cache-unusable", "image-not-cached"})


def problem_of(operation: Operation) -> Problem:
    """What a client is told of a failed or cancelled operation it waited for."""
    code = operation.error_code or operation.state
    unwell = code in UNWELL or code.startswith(("target-", "pool-"))
    status = 409 if code in REFUSALS | IMAGE_REFUSALS else 503 if unwell else 500
    return Problem(status, code, operation.error_detail or f"The operation {operation.kind} was {operation.state}.")


# ---------------------------------------------------------------- the worker's side


def claimable(database: Database, lane: str, share: int = EVERYTHING) -> int:
    """How many operations of the lane could be claimed now; 2 stands for more. A look costs less than a claim."""
    with database.read() as session:
        return len(session.execute(_LOOK[lane], {"in_lane": lane, "moment": now(), "share": share}).all())


def claim(database: Database, worker: str, lane: str, lease: float, share: int = EVERYTHING) -> Operation | None:
    """Take the oldest operation of the lane that is due and whose subject has none running, or whose lease is over.

    Data work keeps its order: one that waits to be tried again is not overtaken. Fences are not held up like that. In
    the lane of images nobody has more than `share` running, and who has fewest comes first.
    """
    moment = now()
    taking = (_TAKE_UNLOCKED if database.dialect == "sqlite" else _TAKE)[lane]
    until = moment + dt.timedelta(seconds=lease)
    values = {"in_lane": lane, "moment": moment, "me": worker, "until": until, "share": share}
    try:
        with database.write(durable=False) as session:  # a claim that is lost with the power is made again
            taken = session.execute(taking, values).scalar()
            return session.get(Operation, taken) if taken else None
    except IntegrityError:
        return None  # another worker started one of the same subject between our look and our write


def _claimable(lane_of_images: bool) -> Select[tuple[UUID]]:
    lane, moment = bindparam("in_lane", type_=Operation.lane.type), bindparam("moment", type_=Operation.not_before.type)
    mine, other = Operation.__table__.c, Operation.__table__.alias("other").c
    busy = exists().where(
        other.subject_id == mine.subject_id, other.lane == lane, other.state == "running", other.id != mine.id
    )
    earlier = exists().where(
        other.subject_id == mine.subject_id,
        other.lane == lane,
        other.lane == "data",
        other.state == "queued",
        other.id < mine.id,
    )
    due = and_(mine.state == "queued", mine.not_before <= moment, ~busy, ~earlier)
    orphaned = and_(mine.state == "running", mine.lease_until < moment)
    if not lane_of_images:
        return select(mine.id).where(mine.lane == lane, or_(due, orphaned)).order_by(mine.id)
    theirs = _running_of_the_same(lane)
    due = and_(due, theirs < bindparam("share", type_=Operation.progress.type))
    return select(mine.id).where(mine.lane == lane, or_(due, orphaned)).order_by(theirs, mine.id)


def _running_of_the_same(lane: ColumnElement[str]) -> ColumnElement[int]:
    """How many operations of the lane run for whoever asked for this one."""
    mine, other = Operation.__table__.c, Operation.__table__.alias("theirs").c
    same = other.principal_id.is_not_distinct_from(mine.principal_id)
    return (
        select(func.count()).where(other.lane == lane, other.state == "running", same).correlate(mine.id.table)
    ).scalar_subquery()


def _locked(chosen: Select[tuple[UUID]]) -> Select[tuple[UUID]]:
    return chosen.with_for_update(skip_locked=True, of=Operation.__table__)


def _take(chosen: Select[tuple[UUID]]) -> ReturningUpdate[tuple[UUID]]:
    table = Operation.metadata.tables[Operation.__tablename__]
    values = {
        "state": "running",
        "worker": bindparam("me"),
        "fence": table.c.fence + 1,
        "attempt": table.c.attempt + 1,
        "lease_until": bindparam("until", type_=Operation.not_before.type),
        "started_at": bindparam("moment", type_=Operation.not_before.type),
    }
    return update(table).where(table.c.id == chosen.scalar_subquery()).values(values).returning(table.c.id)


# Built once: putting them together costs more than running them, and a worker asks often.
_BEHIND = (
    select(Operation.id)
    .where(
        Operation.subject_id == bindparam("of_subject"),
        Operation.lane == bindparam("in_lane"),
        Operation.state == "queued",
    )
    .limit(1)
)
_READY = {lane: _claimable(lane == "image") for lane in LANES}
_LOOK = {lane: ready.limit(2) for lane, ready in _READY.items()}
_TAKE_UNLOCKED = {lane: _take(ready.limit(1)) for lane, ready in _READY.items()}
_TAKE = {lane: _take(_locked(ready.limit(1))) for lane, ready in _READY.items()}


def guarded(session: Session, operation: Operation, **values: Any) -> None:
    """Change the operation if it is still ours; raises Lost otherwise, and with it the whole transaction goes."""
    bound = {f"new_{name}": value for name, value in values.items()}
    mine = {"my_id": operation.id, "my_fence": operation.fence}
    if change(session, _guarded(tuple(values)), mine | bound) != 1:
        raise Lost(str(operation.id))


@cache
def _guarded(names: tuple[str, ...]) -> Update:
    table = Operation.metadata.tables[Operation.__tablename__]
    mine = (table.c.id == bindparam("my_id"), table.c.fence == bindparam("my_fence"), table.c.state == "running")
    return (
        update(table).where(*mine).values({name: bindparam(f"new_{name}", type_=table.c[name].type) for name in names})
    )


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


def renew(session: Session, worker: str, in_hand: Collection[UUID], lease: float) -> None:
    """Those the worker really has in hand stay its own for another `lease` seconds."""
    until = now() + dt.timedelta(seconds=lease)
    mine = (Operation.id.in_(in_hand), Operation.worker == worker, Operation.state == "running")
    change(session, update(Operation).where(*mine).values(lease_until=until))


def queued_behind(session: Session, operation: Operation) -> bool:
    """Whether others of the same subject and lane wait for this one to end."""
    values = {"in_lane": operation.lane, "of_subject": operation.subject_id}
    return session.execute(_BEHIND, values).first() is not None


def take_over(database: Database, host: str) -> int:
    """End the leases of earlier workers of this host. Only for who holds the host's worker lock: they are dead."""
    theirs = (Operation.worker.startswith(f"{host}:", autoescape=True), Operation.state == "running")
    over = now() - dt.timedelta(seconds=1)
    with database.write() as session:
        return change(session, update(Operation).where(*theirs).values(lease_until=over))


def actor_of(operation: Operation) -> Actor:
    """Who asked for it, from where: also of everything the worker does for it."""
    return Actor(operation.actor, operation.address)
