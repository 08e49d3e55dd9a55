"""/v1/pools, /v1/events, and how the service is: /healthz, /readyz"""

from __future__ import annotations

import datetime as dt

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.api import documents
from app.api.contract import Answer, Call, Routes
from app.errors import Problem
from app.models import Event, Pool, WorkerBeat
from app.paging import page
from app.schemas import EventFilter, EventPage, Health, PoolPage
from app.service import is_migrated
from app.states import now

routes = Routes("site")
#: A worker that has not been heard for this long is not counted on.
SILENT = dt.timedelta(seconds=10)


@routes.add("GET", "/v1/pools", answers={200: PoolPage})
def list_pools(call: Call) -> Answer:
    """List the pools: how full they are, what was promised, and what is wrong."""
    with call.read() as session:
        found = session.scalars(select(Pool).order_by(Pool.name)).all()
        return Answer(200, PoolPage(items=[documents.pool(pool) for pool in found]))


@routes.add("GET", "/v1/events", query=EventFilter, answers={200: EventPage})
def list_events(call: Call) -> Answer:
    """List the audit trail, the newest first (admin)."""
    call.caller.require_admin()
    wanted = []
    if call.query.resource is not None:
        wanted.append(Event.resource_id == call.query.resource)
    if call.query.kind is not None:
        wanted.append(Event.kind == call.query.kind)
    with call.read() as session:
        found = page(
            session, Event, limit=call.query.limit, cursor=call.query.next, branches=[wanted], newest_first=True
        )
        return Answer(200, documents.page(EventPage, found, documents.event))


@routes.add("GET", "/healthz", answers={200: Health}, public=True)
def healthz(call: Call) -> Answer:
    """Tell that this process answers."""
    return Answer(200, Health(status="ok"))


@routes.add("GET", "/readyz", answers={200: Health}, public=True)
def readyz(call: Call) -> Answer:
    """Tell whether work would be done: database migrated, worker alive, target up; 503 says what is missing."""
    missing = _missing(call)
    if missing:
        raise Problem(503, "not-ready", "; ".join(missing), headers={"Retry-After": "1"})
    return Answer(200, Health(status="ready"))


def _missing(call: Call) -> list[str]:
    try:
        if not is_migrated(call.service.database):
            return ["the database is not migrated"]
        with call.read() as session:
            beats = session.scalars(select(WorkerBeat).where(WorkerBeat.beat_at > now() - SILENT)).all()
    except SQLAlchemyError as error:
        return [f"the database does not answer ({type(error).__name__})"]
    if not beats:
        return ["no worker is alive"]
    return [] if any(beat.ready for beat in beats) else ["the target is not up yet"]
