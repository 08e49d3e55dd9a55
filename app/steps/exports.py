"""From the database's rows to what the target is to have."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.models import Attachment, Connection, Volume
from app.outside import Outside
from iscsi.target import Connection as TargetConnection
from iscsi.target import Credentials, Export, Login
from pools import PoolUnusable

#: An attachment in one of these states lets its initiator in. `detaching` does not: revoking comes first.
ADMITTED = ("attaching", "attached")


def export_of(outside: Outside, volume_id: UUID) -> Export | None:
    """The export a volume should have now; None when nobody is admitted to it.

    Raises BackingMissing or PoolUnusable when it cannot be told where its bytes lie.
    """
    with outside.database.read() as session:
        volume = session.get(Volume, volume_id)
        admitted = _admitted(session, volume_id)
    if volume is None or not admitted:
        return None
    read_only = volume.held_mode == "ro"
    pool = outside.pools.get(volume.pool)
    if pool is None:
        raise PoolUnusable(volume.pool, "it is not active")
    backing = pool.backing(volume.id, read_only=read_only)
    return Export(
        volume_id=volume.id,
        tid=volume.tid,
        path=backing.path,
        size=backing.size,
        read_only=read_only,
        connections=tuple(_for_target(outside, attachment, connection) for attachment, connection in admitted),
    )


def _admitted(session: Session, volume_id: UUID) -> list[tuple[Attachment, Connection]]:
    query = (
        select(Attachment, Connection)
        .join(Connection, Connection.attachment_id == Attachment.id)
        .where(Attachment.volume_id == volume_id, Attachment.state.in_(ADMITTED))
        .order_by(Attachment.id)
    )
    return [(attachment, connection) for attachment, connection in session.execute(query)]


def _for_target(outside: Outside, attachment: Attachment, connection: Connection) -> TargetConnection:
    secrets = outside.keys.open(attachment.id, connection.key_id, connection.secret)
    mutual = None
    if secrets.mutual_password is not None:
        mutual = Credentials(connection.mutual_username, secrets.mutual_password)
    return TargetConnection(
        initiator=connection.initiator,
        credentials=Credentials(connection.username, secrets.password),
        mutual=mutual,
    )


def admitted_logins(outside: Outside, volume_id: UUID) -> list[Login]:
    """Who may stay when somebody is drained: from rows alone, so that no trouble with bytes or keys stops a fence."""
    with outside.database.read() as session:
        found = [connection for _, connection in _admitted(session, volume_id)]
    return [Login(c.initiator, c.username, c.mutual_username if c.mutual else None) for c in found]


def exported_volumes(session: Session) -> list[UUID]:
    """Volumes with at least one admitted attachment."""
    query = select(Attachment.volume_id).where(Attachment.state.in_(ADMITTED)).distinct()
    return list(session.scalars(query))
