"""/v1/attachments"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app import attachments
from app.api import documents
from app.api.contract import Answer, Call, Routes
from app.api.mutation import Done, mutate
from app.models import Operation
from app.schemas import (
    AttachmentDocument,
    AttachmentFilter,
    AttachmentPage,
    ConnectionDocument,
    Detach,
    OperationDocument,
)

routes = Routes("attachments")


@routes.add("GET", "/v1/attachments", query=AttachmentFilter, answers={200: AttachmentPage})
def list_attachments(call: Call) -> Answer:
    """List attachments that you made or that are of your volumes."""
    with call.read() as session:
        found = attachments.list_page(session, call.caller, call.query)
        return Answer(200, documents.page(AttachmentPage, found, documents.attachment))


@routes.add("GET", "/v1/attachments/{id}", answers={200: AttachmentDocument})
def get_attachment(call: Call) -> Answer:
    """Show an attachment; its secret is at `connection`."""
    with call.read() as session:
        return Answer(200, documents.attachment(attachments.find(session, call.caller, call.id)))


@routes.add("GET", "/v1/attachments/{id}/connection", answers={200: ConnectionDocument})
def read_connection(call: Call) -> Answer:
    """Read the portal, target and secret of an attachment you made; every reading is an event."""
    with call.service.database.write() as session:
        found = attachments.find(session, call.caller, call.id)
        connection, secrets = attachments.read_connection(session, call.service.keys, call.caller, call.id)
        return Answer(200, documents.connection(call.service.settings, found, connection, secrets))


@routes.add("DELETE", "/v1/attachments/{id}", query=Detach, answers={204: None, 202: OperationDocument})
def delete_attachment(call: Call) -> Answer:
    """Detach: revoke the initiator, end its sessions, wait for its last write, remove the target."""

    def intend(session: Session) -> Operation | Done:
        fence = attachments.detach(session, call.caller, call.id, force=call.query.force)
        return fence or Done(Answer(204))

    return mutate(call, intend)
