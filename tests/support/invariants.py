"""What must be true of the rows at any moment between two transactions, whatever clients and workers do."""

from __future__ import annotations

from collections import Counter, defaultdict
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db import Database
from app.models import Attachment, Connection, GoldenCopy, Image, Operation, Pool, Snapshot, User, Volume
from app.operations import OPEN

#: Kinds of operations that read a source, and where to find it.
COPIES = ("volume.clone", "snapshot.create", "volume.revert", "image.from-volume")


def check(database: Database, *, idle: bool = False) -> None:
    """AssertionError lists every broken rule. `idle`: no operation is open, so nothing may be half-way either."""
    with database.read() as session:
        # One moment for all the questions below: SQLite's reads have it, PostgreSQL's only if asked to.
        if database.dialect == "postgresql":
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        broken = [*_usage(session), *_held(session), *_readers(session), *_connections(session), *_running(session)]
        if idle:
            broken += _at_rest(session)
    assert not broken, broken


def _usage(session: Session) -> list[str]:
    """The counters are what the records sum up to; a volume that is to grow counts with its new size."""
    by_owner: dict[UUID, list[int]] = defaultdict(list)
    by_pool: dict[str, int] = Counter()
    volumes = [(v, max(v.size, v.new_size or 0)) for v in session.scalars(select(Volume))]
    for record, size in [*volumes, *((s, s.size) for s in session.scalars(select(Snapshot)))]:
        by_owner[record.owner_id].append(size)
        by_pool[record.pool] += size
    for image in session.scalars(select(Image).where(Image.origin_kind != "reference")):
        by_owner[image.owner_id].append(image.charged)
    for copy in session.scalars(select(GoldenCopy)):
        by_pool[copy.pool] += copy.size
    broken = []
    for user in session.scalars(select(User)):
        found, wanted = (user.used_size, user.used_count), (sum(by_owner[user.id]), len(by_owner[user.id]))
        broken += [f"{user.name} is charged {found}, but has {wanted}"] if found != wanted else []
    for pool in session.scalars(select(Pool)):
        wanted_sum = by_pool[pool.name]
        broken += (
            [f"pool {pool.name} promised {pool.promised}, not {wanted_sum}"] if pool.promised != wanted_sum else []
        )
    return broken


def _held(session: Session) -> list[str]:
    """One rw or many ro; the volume says the same as its attachments, and its state follows."""
    modes: dict[UUID, list[str]] = defaultdict(list)
    for attachment in session.scalars(select(Attachment).where(Attachment.state != "detached")):
        modes[attachment.volume_id].append(attachment.mode)
    broken = []
    for volume in session.scalars(select(Volume)):
        held = modes[volume.id]
        if held.count("rw") > 1 or len(set(held)) > 1:
            broken.append(f"volume {volume.id} is held by {held}")
        if volume.held_mode != (held[0] if held else None):
            broken.append(f"volume {volume.id} says {volume.held_mode}, its attachments {held}")
        if held and volume.state in ("available", "reverting", "deleting", "creating"):
            broken.append(f"volume {volume.id} is {volume.state} and held by {held}")
        if not held and volume.state == "in-use":
            broken.append(f"volume {volume.id} is in use by nobody")
    return broken


def _readers(session: Session) -> list[str]:
    """Every copy that is being made counts once at its source."""
    wanted: Counter[UUID] = Counter()
    for operation in session.scalars(select(Operation).where(Operation.state.in_(OPEN), Operation.kind.in_(COPIES))):
        if operation.kind == "volume.clone":
            made = session.get(Volume, operation.resource_id)
            assert made is not None
            assert made.origin_id is not None
            wanted[made.origin_id] += 1
        elif operation.kind == "snapshot.create":
            wanted[operation.subject_id] += 1
        elif operation.kind == "image.from-volume":
            image = session.get_one(Image, operation.resource_id)
            assert image.origin_id is not None
            wanted[image.origin_id] += 1
        else:
            wanted[UUID(operation.parameters["snapshot"])] += 1
    records: list[Volume | Snapshot] = [*session.scalars(select(Volume)), *session.scalars(select(Snapshot))]
    return [f"{r.id} has {r.readers} readers, not {wanted[r.id]}" for r in records if r.readers != wanted[r.id]]


def _connections(session: Session) -> list[str]:
    """A secret lives as long as its attachment lets somebody in, and no longer."""
    admitted = select(Attachment.id).where(Attachment.state.in_(("attaching", "attached")))
    wanted, found = set(session.scalars(admitted)), set(session.scalars(select(Connection.attachment_id)))
    return [f"attachment {identifier} and its connection disagree" for identifier in wanted ^ found]


def _running(session: Session) -> list[str]:
    running = session.execute(select(Operation.subject_id, Operation.lane).where(Operation.state == "running"))
    counted = Counter((subject, lane) for subject, lane in running)
    return [f"{key} has {count} running operations" for key, count in counted.items() if count > 1]


def _at_rest(session: Session) -> list[str]:
    """Every state that only an operation can end has one; with none open, there is no such state."""
    passing = {Volume: ("creating", "reverting", "deleting"), Snapshot: ("creating", "deleting"),
               Attachment: ("attaching", "detaching"), Operation: OPEN, Image: ("fetching", "deleting")}  # fmt: skip
    broken = [
        f"{model.__tablename__} {row.id} is {row.state}, and nobody works on it"
        for model, states in passing.items()
        for row in session.scalars(select(model).where(model.state.in_(states)))
    ]
    growing = session.scalars(select(Volume.id).where(Volume.new_size.is_not(None)))
    return broken + [f"volume {identifier} is to grow, and nobody works on it" for identifier in growing]
