"""/v1/images, and what the policy says: /v1/judgements"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import images, pins
from app.api import documents
from app.api.contract import Answer, Call, Link, Routes
from app.api.mutation import Done, mutate
from app.models import Image, Operation
from app.schemas import (
    DryRun,
    ImageCreate,
    ImageDocument,
    ImageFilter,
    ImagePage,
    ImageUpdate,
    JudgementCreate,
    JudgementDocument,
    OperationDocument,
    PinDocument,
    PinList,
)

routes = Routes("images")

FOLLOW = tuple(Link(201, name, "id") for name in ("get_image", "update_image", "list_pins", "delete_image"))


def _shown(call: Call, session: Session, identifier: UUID, status: int = 200) -> Answer:
    return _answer(call, session, images.find(session, call.caller, identifier), status)


def _answer(call: Call, session: Session, found: Image, status: int = 200) -> Answer:
    headers = documents.etag(found)
    if status == 201:
        headers["Location"] = f"/v1/images/{found.id}"
    more = images.shown(session, call.caller, [found])[found.id]
    return Answer(status, documents.image(found, more), headers)


@routes.add("POST", "/v1/images", body=ImageCreate, query=DryRun, links=FOLLOW,
            answers={201: ImageDocument, 202: OperationDocument}, headers={201: ("Location", "ETag")})  # fmt: skip
def create_image(call: Call) -> Answer:
    """Have an image: fetched by its reference, made of a volume or snapshot, or to be uploaded."""

    def intend(session: Session) -> Operation | Done:
        made = images.create(session, call.service.settings, call.caller, call.body)
        return made if isinstance(made, Operation) else Done(_answer(call, session, made, 201))

    return mutate(call, intend, lambda session, identifier: _shown(call, session, identifier, 201))


@routes.add("GET", "/v1/images", query=ImageFilter, answers={200: ImagePage})
def list_images(call: Call) -> Answer:
    """List the images you may see, a page at a time."""
    with call.read() as session:
        found = images.list_page(session, call.caller, call.query)
        more = images.shown(session, call.caller, found.items)
        return Answer(200, documents.page(ImagePage, found, lambda image: documents.image(image, more[image.id])))


@routes.add("GET", "/v1/images/{id}", answers={200: ImageDocument}, headers={200: ("ETag",)})
def get_image(call: Call) -> Answer:
    """Show an image."""
    with call.read() as session:
        return _shown(call, session, call.id)


@routes.add("PATCH", "/v1/images/{id}", body=ImageUpdate, query=DryRun, if_match=True,
            answers={200: ImageDocument}, headers={200: ("ETag",)})  # fmt: skip
def update_image(call: Call) -> Answer:
    """Rename or publish an image."""

    def intend(session: Session) -> Done:
        return Done(
            _answer(call, session, images.update_record(session, call.caller, call.id, call.body, call.if_match))
        )

    return mutate(call, intend)


@routes.add("DELETE", "/v1/images/{id}", query=DryRun, if_match=True, answers={204: None, 202: OperationDocument})
def delete_image(call: Call) -> Answer:
    """Delete an image; refused while something depends on it."""
    return mutate(call, lambda session: images.request_delete(session, call.caller, call.id, call.if_match))


# ---------------------------------------------------------------- pins


@routes.add("GET", "/v1/images/{id}/pins", answers={200: PinList})
def list_pins(call: Call) -> Answer:
    """List who keeps the image from going (nodes and admins)."""
    with call.read() as session:
        found = pins.list_of(session, call.caller, call.id)
        return Answer(200, PinList(items=[documents.pin(pin) for pin in found]))


@routes.add("PUT", "/v1/images/{id}/pins/{name}", query=DryRun, answers={200: PinDocument})
def pin_image(call: Call) -> Answer:
    """Keep the image as long as an overlay lies on it, and learn where it is (nodes and admins)."""

    def intend(session: Session) -> Done:
        settings = call.service.settings
        return Done(Answer(200, pins.pin(session, settings, call.caller, call.id, call.path["name"])))

    return mutate(call, intend)


@routes.add("DELETE", "/v1/images/{id}/pins/{name}", query=DryRun, answers={204: None})
def unpin_image(call: Call) -> Answer:
    """End a pin of yours; any, for an admin."""

    def intend(session: Session) -> Done:
        pins.unpin(session, call.caller, call.id, call.path["name"])
        return Done(Answer(204))

    return mutate(call, intend)


# ---------------------------------------------------------------- judgements


@routes.add("POST", "/v1/judgements", body=JudgementCreate, query=DryRun,
            answers={200: JudgementDocument, 202: OperationDocument})  # fmt: skip
def create_judgement(call: Call) -> Answer:
    """Ask what the policy says to a reference; nothing is downloaded."""

    def answer(session: Session, identifier: UUID) -> Answer:
        judged = session.scalars(select(Operation).where(Operation.resource_id == identifier)).one()
        return Answer(200, JudgementDocument.model_validate(judged.result))

    settings = call.service.settings
    return mutate(call, lambda session: images.judge(session, settings, call.caller, call.body), answer)
