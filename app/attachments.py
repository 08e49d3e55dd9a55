"""Attachments: one volume to one instance on one node, with a secret of their own, and the fence that ends them."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, joinedload

from app import operations, volumes
from app.auth import Caller, may_write
from app.config import Settings
from app.db import change
from app.errors import conflict, forbidden, not_found
from app.events import SYSTEM, record
from app.ids import new_id
from app.keys import ChapSecrets, KeyRing, new_chap_secret
from app.models import Attachment, Connection, Operation, Pool, User, Volume
from app.paging import Page, page
from app.schemas import AttachmentCreate, AttachmentFilter
from app.states import now, transition


def find(session: Session, caller: Caller, identifier: UUID) -> Attachment:
    """Seen by who attached, by the volume's owner and by admins; Problem 404 for everyone else."""
    attachment = session.get(Attachment, identifier, options=[joinedload(Attachment.volume)], populate_existing=True)
    if attachment is None or not visible(caller, attachment):
        raise not_found("attachment", identifier)
    return attachment


def visible(caller: Caller, attachment: Attachment) -> bool:
    return caller.is_admin or caller.id in (attachment.principal_id, attachment.volume.owner_id)


def list_page(session: Session, caller: Caller, wanted: AttachmentFilter) -> Page[Attachment]:
    filters: list[ColumnElement[bool]] = []
    if wanted.volume is not None:
        filters.append(Attachment.volume_id == wanted.volume)
    if wanted.node is not None:
        filters.append(Attachment.node == wanted.node)
    if wanted.state is not None:
        filters.append(Attachment.state == wanted.state)
    branches = [filters]
    if not caller.is_admin:
        owned = Attachment.volume_id.in_(select(Volume.id).where(Volume.owner_id == caller.id))
        branches = [[Attachment.principal_id == caller.id, *filters], [owned, *filters]]
    return page(session, Attachment, limit=wanted.limit, cursor=wanted.next, branches=branches)


# ---------------------------------------------------------------- attach


def attach(
    session: Session, settings: Settings, keys: KeyRing, caller: Caller, volume_id: UUID, body: AttachmentCreate
) -> Operation:
    """Take the volume for one initiator, or conflict; then record attachment, connection and operation."""
    volume = volumes.find(session, caller, volume_id)
    initiator = _initiator(session, settings, caller, body)
    if body.mode == "rw" and not may_write(session, caller, volume):
        raise forbidden("read-only-access", "You may attach this volume with mode ro only.")
    _hold(session, volume, body.mode)
    attachment = _insert(session, caller, volume, body, initiator)
    _connect(session, settings, keys, attachment, mutual=body.mutual_chap)
    detail = {"volume": str(volume.id), "instance": body.instance_id, "node": body.node, "initiator": initiator}
    record(session, caller.actor, "attachment.attach", ("attachment", attachment.id), mode=body.mode, **detail)
    return operations.enqueue(session, "attachment.attach", caller, volume.id, ("attachment", attachment.id))


def _initiator(session: Session, settings: Settings, caller: Caller, body: AttachmentCreate) -> str:
    """The initiator, if this caller may attach to it."""
    initiator = body.initiator
    if caller.role == "node":
        if body.node != caller.name or initiator != caller.initiator:
            raise forbidden(
                "not-this-node", f"This token attaches to node {caller.name}, initiator {caller.initiator}, only."
            )
        return initiator
    if not caller.is_admin and not settings.attachments.direct:
        raise forbidden("direct-attach-disabled", "This site lets only its nodes attach volumes. Ask an admin.")
    if session.scalar(select(User.id).where(User.initiator == initiator)) is not None:
        raise forbidden("initiator-of-a-node", f"{initiator} belongs to a node; only that node attaches to it.")
    return initiator


def _hold(session: Session, volume: Volume, mode: str) -> None:
    """The one place where a volume is taken: a conditional UPDATE that one of many callers wins."""
    live = select(Pool.live_clone).where(Pool.name == Volume.pool).scalar_subquery()
    free = [Volume.held_mode.is_(None), or_(Volume.readers == 0, live)]
    if mode == "ro":
        free = [or_(Volume.held_mode.is_(None), Volume.held_mode == "ro")]
    if transition(session, Volume, volume.id, "in-use", *free, only_from=("available", "in-use"), held_mode=mode):
        return
    session.refresh(volume)
    if volume.held_mode is not None:
        raise conflict(
            "volume-in-use",
            f"Volume {volume.id} is attached with mode {volume.held_mode}; one rw or many ro are possible.",
        )
    if volume.state == "available" and volume.readers:
        raise conflict("volume-busy", f"Volume {volume.id} is being copied; wait for that, or attach it with mode ro.")
    raise volumes.not_available(volume)


def _insert(session: Session, caller: Caller, volume: Volume, body: AttachmentCreate, initiator: str) -> Attachment:
    attachment = Attachment(
        id=new_id(),
        volume_id=volume.id,
        principal_id=caller.id,
        instance_id=body.instance_id,
        node=body.node,
        initiator=initiator,
        mode=body.mode,
        held_mode=body.mode,
        direct=caller.role != "node",
        state="attaching",
        created_at=now(),
    )
    session.add(attachment)
    wanted = volume.id  # a failed flush leaves nothing of the session's to be asked
    try:
        session.flush()
    except IntegrityError:
        raise conflict("initiator-attached", f"Volume {wanted} is attached to {initiator} already.") from None
    return attachment


def _connect(session: Session, settings: Settings, keys: KeyRing, attachment: Attachment, *, mutual: bool) -> None:
    if mutual and not settings.iscsi.mutual_chap_many:
        _only_mutual(session, attachment.volume_id)
    plain = ChapSecrets(new_chap_secret(), new_chap_secret() if mutual else None)
    key_id, secret = keys.seal(attachment.id, plain)
    direct_portal = settings.attachments.direct_portal if attachment.direct else None
    session.add(
        Connection(
            id=new_id(),
            attachment_id=attachment.id,
            role="primary",
            initiator=attachment.initiator,
            networks=settings.attachments.direct_networks if attachment.direct else [],
            portal=direct_portal or settings.iscsi.portal,
            username=f"a{attachment.id.hex}",
            mutual=mutual,
            key_id=key_id,
            secret=secret,
            created_at=now(),
        )
    )
    session.flush()


def _only_mutual(session: Session, volume_id: UUID) -> None:
    """A target has one outgoing account. The volume's row is locked by `_hold`: nobody is between us and the count."""
    query = select(func.count()).select_from(Connection).join(Attachment).where(Attachment.volume_id == volume_id)
    if session.scalar(query.where(Connection.mutual, Attachment.held_mode.is_not(None))):
        raise conflict(
            "mutual-chap-taken", "Another attachment of this volume uses mutual CHAP; a target can do it once."
        )


def read_connection(
    session: Session, keys: KeyRing, caller: Caller, identifier: UUID
) -> tuple[Connection, ChapSecrets]:
    """How to reach the volume, with the secret: to who attached and to nobody else; every reading is an event."""
    attachment = find(session, caller, identifier)
    if attachment.principal_id != caller.id:
        raise forbidden("not-your-connection", "Only who attached the volume may read its connection.")
    record(session, caller.actor, "attachment.connection-read", ("attachment", attachment.id))
    return open_connection(session, keys, attachment)


def open_connection(session: Session, keys: KeyRing, attachment: Attachment) -> tuple[Connection, ChapSecrets]:
    """The primary connection and its opened secrets; conflict when the attachment has ended."""
    primary = (Connection.attachment_id == attachment.id, Connection.role == "primary")
    found = session.scalar(select(Connection).where(*primary))
    if found is None:
        raise conflict("attachment-ended", f"Attachment {attachment.id} is {attachment.state}: its connection is gone.")
    return found, keys.open(attachment.id, found.key_id, found.secret)


# ---------------------------------------------------------------- detach


def detach(session: Session, caller: Caller, identifier: UUID, *, force: bool) -> Operation | None:
    """Revoke the attachment and record the fence; None when it is detached already."""
    attachment = find(session, caller, identifier)
    _may_detach(session, caller, attachment, force)
    if attachment.state == "detached":
        return None
    # When somebody was first, this caller's own operation ends with theirs.
    return revoke(session, attachment, "force" if force else "asked", caller) or _fence(session, attachment, caller)


def _may_detach(session: Session, caller: Caller, attachment: Attachment, force: bool) -> None:
    if force:
        caller.require_admin()
    elif attachment.principal_id != caller.id:
        principal = session.get_one(User, attachment.principal_id)
        who = f"node {principal.name}" if principal.role == "node" else "another principal"
        code = "force-required" if caller.is_admin else "attached-by-another"
        raise conflict(code, f"{who} attached this volume: only they detach it, or an admin with force.")


def revoke(session: Session, attachment: Attachment, reason: str, caller: Caller | None = None) -> Operation | None:
    """attaching|attached|error → detaching, secret gone, fence queued; None when somebody was first."""
    if not transition(session, Attachment, attachment.id, "detaching"):
        return None
    change(session, delete(Connection).where(Connection.attachment_id == attachment.id))
    touch(session, attachment)
    actor = caller.actor if caller else SYSTEM
    volume = str(attachment.volume_id)
    record(session, actor, "attachment.detach", ("attachment", attachment.id), volume=volume, reason=reason)
    return _fence(session, attachment, caller)


def _fence(session: Session, attachment: Attachment, caller: Caller | None) -> Operation:
    resource = ("attachment", attachment.id)
    return operations.enqueue(session, "attachment.detach", caller, attachment.volume_id, resource)


def touch(session: Session, attachment: Attachment) -> None:
    """The volume's record shows its attachments: a change of one is a change of the other."""
    values = {"version": Volume.version + 1, "updated_at": now()}
    change(session, update(Volume).where(Volume.id == attachment.volume_id).values(**values))
