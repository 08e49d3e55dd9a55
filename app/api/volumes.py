"""/v1/volumes"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import Session

from app import attachments, from_image, snapshots, volumes
from app.api import documents
from app.api.contract import Answer, Call, Link, Routes
from app.api.mutation import Done, mutate
from app.models import Attachment, Operation
from app.schemas import (
    AttachmentCreate,
    AttachmentWithConnection,
    DryRun,
    Empty,
    OperationDocument,
    Revert,
    ShareDocument,
    ShareList,
    ShareTarget,
    ShareUpdate,
    SnapshotCreate,
    SnapshotDocument,
    VolumeCreate,
    VolumeDocument,
    VolumeFilter,
    VolumePage,
    VolumeUpdate,
)

routes = Routes("volumes")


def _links(*names: str) -> tuple[Link, ...]:
    return tuple(Link(201, name, "id") for name in names)


def _shown(call: Call, session: Session, identifier: UUID, status: int = 200) -> Answer:
    found = volumes.find(session, call.caller, identifier)
    headers = documents.etag(found)
    if status == 201:
        headers["Location"] = f"/v1/volumes/{identifier}"
    return Answer(status, documents.volume(found, call.caller), headers)


FOLLOW = (
    *_links("get_volume", "update_volume", "create_attachment", "create_snapshot", "reset_volume_state"),
    *_links("list_shares", "share_volume", "unshare_volume", "delete_volume"),
    Link(201, "create_volume", None, body={"volume": "/id"}),
)


@routes.add("POST", "/v1/volumes", body=VolumeCreate, query=DryRun, links=FOLLOW,
            answers={201: VolumeDocument, 202: OperationDocument}, headers={201: ("Location", "ETag")})  # fmt: skip
def create_volume(call: Call) -> Answer:
    """Create a volume, empty or as a copy of an image, a snapshot or a volume."""
    create = volumes.create if call.body.image is None else from_image.create
    return mutate(
        call,
        lambda session: create(session, call.service.settings, call.caller, call.body),
        lambda session, identifier: _shown(call, session, identifier, 201),
    )


@routes.add("GET", "/v1/volumes", query=VolumeFilter, answers={200: VolumePage})
def list_volumes(call: Call) -> Answer:
    """List the volumes you may see, a page at a time."""
    with call.read() as session:
        found = volumes.list_page(session, call.caller, call.query)
        return Answer(200, documents.page(VolumePage, found, lambda v: documents.volume(v, call.caller)))


@routes.add("GET", "/v1/volumes/{id}", answers={200: VolumeDocument}, headers={200: ("ETag",)})
def get_volume(call: Call) -> Answer:
    """Show a volume."""
    with call.read() as session:
        return _shown(call, session, call.id)


@routes.add("PATCH", "/v1/volumes/{id}", body=VolumeUpdate, query=DryRun, if_match=True,
            answers={200: VolumeDocument, 202: OperationDocument}, headers={200: ("ETag",)})  # fmt: skip
def update_volume(call: Call) -> Answer:
    """Rename, publish or grow a volume."""

    def intend(session: Session) -> Operation | Done:
        settings = call.service.settings
        growing = volumes.update_record(session, settings, call.caller, call.id, call.body, call.if_match)
        return growing or Done(_shown(call, session, call.id))

    return mutate(call, intend, lambda session, identifier: _shown(call, session, identifier))


@routes.add("DELETE", "/v1/volumes/{id}", query=DryRun, if_match=True, answers={204: None, 202: OperationDocument})
def delete_volume(call: Call) -> Answer:
    """Delete a volume and its data; refused while it is attached or being copied."""
    return mutate(call, lambda session: volumes.request_delete(session, call.caller, call.id, call.if_match))


@routes.add("POST", "/v1/volumes/{id}/attachments", body=AttachmentCreate, query=DryRun,
            links=_links("get_attachment", "read_connection", "delete_attachment"),
            answers={201: AttachmentWithConnection, 202: OperationDocument}, headers={201: ("Location",)})  # fmt: skip
def create_attachment(call: Call) -> Answer:
    """Attach a volume to one initiator; the answer holds the connection and its secret."""
    service = call.service

    def answer(session: Session, identifier: UUID) -> Answer:
        found = attachments.find(session, call.caller, identifier)
        return Answer(201, _with_connection(call, session, found), {"Location": f"/v1/attachments/{identifier}"})

    answered = mutate(
        call,
        lambda session: attachments.attach(session, service.settings, service.keys, call.caller, call.id, call.body),
        answer,
    )
    if call.repeated and isinstance(answered.document, AttachmentWithConnection):
        with service.database.write() as session:  # told again; the first telling is the attachment's own event
            attachments.read_connection(session, service.keys, call.caller, answered.document.id)
    return answered


def _with_connection(call: Call, session: Session, found: Attachment) -> AttachmentWithConnection:
    service = call.service
    connection, secrets = attachments.open_connection(session, service.keys, found)
    told = documents.connection(service.settings, found, connection, secrets)
    return AttachmentWithConnection(**documents.attachment(found).model_dump(), connection=told)


@routes.add("POST", "/v1/volumes/{id}/snapshots", body=SnapshotCreate, query=DryRun,
            links=(*_links("get_snapshot", "delete_snapshot"),
                   Link(201, "revert_volume", pointer="/volume_id", body={"snapshot": "/id"}),
                   Link(201, "create_volume", None, body={"snapshot": "/id"})),
            answers={201: SnapshotDocument, 202: OperationDocument}, headers={201: ("Location", "ETag")})  # fmt: skip
def create_snapshot(call: Call) -> Answer:
    """Keep a volume's bytes as they are now."""

    def answer(session: Session, identifier: UUID) -> Answer:
        found = snapshots.find(session, call.caller, identifier)
        headers = {"Location": f"/v1/snapshots/{identifier}", **documents.etag(found)}
        return Answer(201, documents.snapshot(found), headers)

    settings = call.service.settings
    return mutate(call, lambda session: snapshots.create(session, settings, call.caller, call.id, call.body), answer)


@routes.add("POST", "/v1/volumes/{id}/revert", body=Revert, query=DryRun,
            answers={200: VolumeDocument, 202: OperationDocument}, headers={200: ("ETag",)})  # fmt: skip
def revert_volume(call: Call) -> Answer:
    """Give a detached volume the bytes of one of its snapshots again."""
    return mutate(
        call,
        lambda session: volumes.revert(session, call.caller, call.id, call.body.snapshot),
        lambda session, identifier: _shown(call, session, identifier),
    )


@routes.add("POST", "/v1/volumes/{id}/reset-state", body=Empty, query=DryRun,
            answers={200: VolumeDocument, 202: OperationDocument}, headers={200: ("ETag",)})  # fmt: skip
def reset_volume_state(call: Call) -> Answer:
    """Derive a volume's state again from what is really there (admin)."""
    return mutate(
        call,
        lambda session: volumes.reset_state(session, call.caller, call.id),
        lambda session, identifier: _shown(call, session, identifier),
    )


# ---------------------------------------------------------------- shares


def _shares(call: Call, session: Session) -> ShareList:
    found = volumes.shares(session, call.caller, call.id)
    return ShareList(items=[ShareDocument.model_validate({"group": group, "mode": mode}) for group, mode in found])


@routes.add("GET", "/v1/volumes/{id}/shares", answers={200: ShareList})
def list_shares(call: Call) -> Answer:
    """List the groups a volume is shared with."""
    with call.read() as session:
        return Answer(200, _shares(call, session))


@routes.add("PUT", "/v1/volumes/{id}/shares", body=ShareUpdate, query=DryRun, answers={200: ShareList})
def share_volume(call: Call) -> Answer:
    """Share a volume with a group, or change the mode of that share."""

    def intend(session: Session) -> Done:
        volumes.share(session, call.caller, call.id, call.body)
        session.flush()
        return Done(Answer(200, _shares(call, session)))

    return mutate(call, intend)


@routes.add("DELETE", "/v1/volumes/{id}/shares", query=ShareTarget, answers={204: None})
def unshare_volume(call: Call) -> Answer:
    """End the share with a group; attachments that exist stay."""

    def intend(session: Session) -> Done:
        volumes.unshare(session, call.caller, call.id, call.query.group)
        return Done(Answer(204))

    return mutate(call, intend)
