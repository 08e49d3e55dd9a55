"""From rows to documents: what of a record this caller is shown."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app import accounts
from app.auth import Caller
from app.config import Settings
from app.images import Shown
from app.keys import ChapSecrets
from app.models import (
    Attachment,
    Connection,
    Event,
    Group,
    Image,
    ImagePin,
    Pool,
    Snapshot,
    Token,
    User,
    Volume,
)
from app.paging import Page
from app.schemas import (
    AttachmentDocument,
    ConnectionDocument,
    EventDocument,
    GroupDocument,
    ImageDocument,
    NodeDocument,
    PinEntry,
    PoolDocument,
    SnapshotDocument,
    TokenDocument,
    UserDocument,
    VolumeDocument,
)
from iscsi.names import LUN, serial, target_name


def etag(record: Volume | Snapshot | Image) -> dict[str, str]:
    return {"ETag": f'"v{record.version}"'}


def volume(record: Volume, caller: Caller) -> VolumeDocument:
    """Attachments of others, and what it was copied from, are told to the owner and to admins only."""
    theirs = caller.is_admin or caller.id == record.owner_id
    shown = [a for a in record.attachments if theirs or caller.id == a.principal_id]
    origin = {"kind": record.origin_kind, "id": record.origin_id} if record.origin_id and theirs else None
    return VolumeDocument.model_validate(
        _members(record, VolumeDocument)
        | {
            "owner": record.owner.name,
            "origin": origin,
            "error": record.error if theirs else None,
            "serial": serial(record.id),
            "attachments": [attachment(a) for a in shown],
        }
    )


def _members(record: Any, model: Any) -> dict[str, Any]:
    """The document's members that the row has under the same name."""
    columns = record.__table__.columns.keys()
    return {name: getattr(record, name) for name in model.model_fields if name in columns}


def attachment(record: Attachment) -> AttachmentDocument:
    return AttachmentDocument.model_validate(record)


def connection(settings: Settings, record: Attachment, found: Connection, secrets: ChapSecrets) -> ConnectionDocument:
    auth = {"username": found.username, "password": secrets.password}
    if secrets.mutual_password is not None:
        auth |= {"mutual_username": found.mutual_username, "mutual_password": secrets.mutual_password}
    target = target_name(settings.iscsi.iqn_prefix, record.volume_id)
    return ConnectionDocument.model_validate({"portal": found.portal, "target": target, "lun": LUN, "auth": auth})


def snapshot(record: Snapshot) -> SnapshotDocument:
    return SnapshotDocument.model_validate(_members(record, SnapshotDocument) | {"owner": record.owner.name})


#: What the entry that passed says of an image, and everybody who sees the image is told.
_FACTS = ("title", "os", "endorser")


def image(record: Image, more: Shown) -> ImageDocument:
    """The reference, and what went wrong, are told only to those who are close: a URL can hold secrets. Who asked for
    what somebody else had asked for shares it, and does not learn whose it is."""
    facts = record.facts or {}
    origin = {"kind": record.origin_kind, "id": record.origin_id if more.close else None}
    return ImageDocument.model_validate(
        _members(record, ImageDocument)
        | {name: facts.get(name) for name in _FACTS}
        | {
            "name": record.name if more.named else None,
            "owner": record.owner.name if more.named else None,
            "origin": origin,
            "error": record.error if more.close else None,
            "reference": record.reference if more.close else None,
            "source_digests": record.source_digests or {},
            "pins": more.pins,
        }
    )


def pin(record: ImagePin) -> PinEntry:
    return PinEntry.model_validate(_members(record, PinEntry) | {"principal": record.principal.name})


def token(record: Token) -> TokenDocument:
    return TokenDocument.model_validate(_members(record, TokenDocument) | {"user": record.user.name})


def user(record: User) -> UserDocument:
    return UserDocument.model_validate(record)


def node(record: User) -> NodeDocument:
    return NodeDocument.model_validate(record)


def group(session: Session, record: Group) -> GroupDocument:
    return GroupDocument.model_validate(
        _members(record, GroupDocument) | {"members": accounts.members(session, record)}
    )


def pool(record: Pool) -> PoolDocument:
    return PoolDocument.model_validate(record)


def event(record: Event) -> EventDocument:
    resource = {"kind": record.resource_kind, "id": record.resource_id} if record.resource_id else None
    return EventDocument.model_validate(_members(record, EventDocument) | {"resource": resource})


def page(model: Any, found: Page[Any], render: Any) -> Any:
    """A list's page as its document."""
    return model(items=[render(item) for item in found.items], next=found.next)
