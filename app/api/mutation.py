"""How every change is answered: the intention committed, its operation waited for, its answer found again.

    intend (one transaction) ──▶ operation ──wait──▶ done: 200/201/204   not yet: 202 with the operation
                             └─▶ Done: answered at once

`?dry_run=true` runs the same intention and rolls it back. An `Idempotency-Key` is committed with the intention: a
repeated request finds it and is answered from the operation, never acting twice.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import accounts, operations
from app.api.contract import Answer, Call
from app.errors import Problem, conflict
from app.models import IdempotencyKey, Operation, Pool, Snapshot, Volume
from app.notify import WORK
from app.operations import FINAL, KINDS
from app.schemas import Conflict, OperationDocument, Plan, PoolDocument, QuotaDocument
from app.states import now

#: Everybody may wait this long, seconds; most operations take a hundredth of it.
BRIEF = 1.0


@dataclass(frozen=True)
class Done:
    """An intention that needs no operation. `secret` names a member that a repeated request is not told again."""

    answer: Answer
    secret: str | None = None


Intend = Callable[[Session], Operation | Done]
Answering = Callable[[Session, UUID], Answer]


class _RolledBack(Exception):
    """Ends a dry run's transaction."""


def mutate(call: Call, intend: Intend, answer: Answering | None = None) -> Answer:
    """Do what `intend` records; `answer` makes the final answer from the resource's id once its operation succeeded."""
    if call.dry_run:
        return _plan(call, intend)
    outcome = _commit(call, intend)
    if isinstance(outcome, Done):
        return outcome.answer
    if isinstance(outcome, IdempotencyKey):
        return _again(call, outcome, answer)
    # A volume that waits for its image may have begun the image's operation too, which is of another lane.
    call.service.bus.announce(WORK, outcome.lane if outcome.kind != "volume.from-image" else "")
    return wait_for(call, outcome.id, answer, call.wait)


def _commit(call: Call, intend: Intend) -> Operation | Done | IdempotencyKey:
    with call.service.database.write() as session:
        if call.idempotency_key is None:
            return intend(session)
        known = session.get(IdempotencyKey, (call.caller.id, call.idempotency_key))
        if known is not None:
            return known
        entry = _enter_key(session, call)
        outcome = intend(session)
        if isinstance(outcome, Done):
            entry.status, entry.body = outcome.answer.status, _kept(outcome)
        else:
            entry.operation_id = outcome.id
        return outcome


def _enter_key(session: Session, call: Call) -> IdempotencyKey:
    entry = IdempotencyKey(
        principal_id=call.caller.id, key=call.idempotency_key, fingerprint=_fingerprint(call), created_at=now()
    )
    session.add(entry)
    try:
        session.flush()
    except IntegrityError:
        raise _in_flight() from None
    return entry


def _in_flight() -> Problem:
    detail = "The first request with this Idempotency-Key is still being answered; ask again in a moment."
    return Problem(409, "idempotency-in-flight", detail, headers={"Retry-After": "1"})


def _fingerprint(call: Call) -> str:
    request = call.request
    parts = (request.method.encode(), request.full_path.encode(), request.get_data())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _kept(done: Done) -> dict[str, Any]:
    """What a repeated request is answered with: everything but the secret."""
    document = done.answer.document.model_dump(mode="json") if done.answer.document else None
    if document and done.secret:
        document[done.secret] = None
    return {"headers": dict(done.answer.headers), "document": document}


def _again(call: Call, entry: IdempotencyKey, answer: Answering | None) -> Answer:
    """The answer of a request that was made before."""
    if entry.fingerprint != _fingerprint(call):
        detail = "This Idempotency-Key was used for another request; use a new one for each."
        raise Problem(422, "idempotency-key-reused", detail)
    if entry.operation_id is None:
        assert entry.status is not None
        model = call.operation.answers[entry.status]
        kept = entry.body or {}
        document = model.model_validate(kept["document"]) if model and kept["document"] is not None else None
        return Answer(entry.status, document, kept["headers"])
    with call.read() as session:
        operation = session.get(Operation, entry.operation_id)
    if operation is None:
        raise conflict("operation-gone", "The operation of the first request is no longer recorded.")
    young = (now() - operation.created_at).total_seconds() < call.service.settings.server.wait
    if operation.state not in FINAL and young:
        raise _in_flight()
    call.repeated = True
    return wait_for(call, operation.id, answer, 0)


def wait_for(call: Call, operation_id: UUID, answer: Answering | None, seconds: float) -> Answer:
    """The end of the operation, or 202 with where to look. No database connection is held while waiting."""

    def told(session: Session, operation: Operation) -> Answer:
        if operation.state not in FINAL:
            headers = {"Location": f"/v1/operations/{operation.id}", "Retry-After": "1"}
            return Answer(202, operation_document(operation), headers)
        if operation.state != "succeeded":
            raise operations.problem_of(operation)
        return answer(session, operation.resource_id) if answer else Answer(204)

    return await_end(call, operation_id, seconds, told)


Telling = Callable[[Session, Operation], Answer]


def await_end(call: Call, operation_id: UUID, seconds: float, tell: Telling) -> Answer:
    """What there is to `tell` when the operation has ended or `seconds` are over, or soon where too many wait long.

    It is told in the same look at the database that finds the operation ended.
    """
    waiters = call.service.waiters
    with waiters.expect(operation_id) as news:
        answer = _when_ended(call, operation_id, news, min(seconds, BRIEF), tell)
        if answer is None and seconds > BRIEF:
            with waiters.place() as granted:
                answer = _when_ended(call, operation_id, news, seconds - BRIEF, tell) if granted else None
    if answer is not None:
        return answer
    with call.read() as session:
        return tell(session, session.get_one(Operation, operation_id))


def _when_ended(call: Call, operation_id: UUID, news: threading.Event, seconds: float, tell: Telling) -> Answer | None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        news.wait(min(left, 1.0))
        news.clear()
        with call.read() as session:
            operation = session.get_one(Operation, operation_id)
            if operation.state in FINAL:
                return tell(session, operation)
    return None


def operation_document(operation: Operation) -> OperationDocument:
    error = {"code": operation.error_code, "detail": operation.error_detail or ""} if operation.error_code else None
    values: dict[str, Any] = {
        name: getattr(operation, name)
        for name in ("id", "kind", "state", "progress", "message", "result", "created_at", "started_at", "finished_at")
    }
    resource = {"kind": operation.resource_kind, "id": operation.resource_id}
    return OperationDocument.model_validate(values | {"error": error, "resource": resource})


# ---------------------------------------------------------------- dry run


def _plan(call: Call, intend: Intend) -> Answer:
    """What would be done: the intention itself, rolled back."""
    plan: dict[str, Any] = {"allowed": True, "steps": [], "conflicts": []}
    try:
        with call.service.database.write() as session:
            _try_out(session, call, intend, plan)
            raise _RolledBack
    except _RolledBack:
        return Answer(200, Plan.model_validate(plan))


def _try_out(session: Session, call: Call, intend: Intend, plan: dict[str, Any]) -> None:
    savepoint = session.begin_nested()
    try:
        outcome = intend(session)
        session.flush()
        if isinstance(outcome, Operation):
            plan["steps"] = [*KINDS[outcome.kind].steps]
            plan["space"] = _space(session, outcome)
        else:
            plan["steps"] = ["change the record"]
    except Problem as problem:
        if problem.status != 409:
            raise
        savepoint.rollback()
        plan |= {"allowed": False, "conflicts": [Conflict(code=problem.code, detail=problem.detail)]}
    plan["quota"] = QuotaDocument.model_validate(
        accounts.quota(session, call.service.settings, call.caller, call.caller.name)
    )


def _space(session: Session, operation: Operation) -> PoolDocument | None:
    """The pool as it would be then."""
    models: dict[str, type[Snapshot] | type[Volume]] = {"snapshot": Snapshot, "volume": Volume}
    model = models.get(operation.resource_kind)
    name = session.scalar(select(model.pool).where(model.id == operation.resource_id)) if model else None
    pool = session.get(Pool, name, populate_existing=True) if name else None
    return PoolDocument.model_validate(pool) if pool else None
