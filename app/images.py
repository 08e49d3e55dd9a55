"""Images: check, then record the intention. What is done about it is in `app.steps.images`.

ask for a reference ──▶ nobody has: a row `fetching` and its operation
                    ├─▶ being fetched: the asker joins, and gets the same operation
                    └─▶ there: it is judged anew by the policy of today, then the asker may use it
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, joinedload

from app import capacity, holds, operations, volumes
from app.auth import Caller, require_owner
from app.config import Settings
from app.db import change
from app.errors import Problem, conflict, invalid, not_found
from app.events import record
from app.ids import new_id
from app.models import Image, ImageAsker, Operation, Snapshot, User, Volume
from app.operations import OPEN
from app.paging import Page, page
from app.schemas import ImageCreate, ImageFilter, ImageUpdate, JudgementCreate
from app.states import now, transition

SHOWN = (joinedload(Image.owner),)
#: How often a request looks again when what it joins ends that very moment.
TRIES = 5


# ---------------------------------------------------------------- who sees what


def _asked(caller: Caller) -> ColumnElement[bool]:
    return exists().where(ImageAsker.image_id == Image.id, ImageAsker.user_id == caller.id)


def may_see(caller: Caller) -> ColumnElement[bool]:
    """The condition on a single image: its owner, who asked for it, everybody if it is public; nodes and admins all."""
    if caller.sees_all:
        return Image.id.is_not(None)
    return or_(Image.owner_id == caller.id, Image.visibility == "public", _asked(caller))


def find(session: Session, caller: Caller, identifier: UUID) -> Image:
    """The image if the caller may see it; Problem 404 otherwise."""
    query = select(Image).where(Image.id == identifier, may_see(caller)).options(*SHOWN)
    image = session.scalar(query.execution_options(populate_existing=True))
    if image is None:
        raise not_found("image", identifier)
    return image


def list_page(session: Session, caller: Caller, wanted: ImageFilter) -> Page[Image]:
    """Seen as `may_see` says, by branches that each use an index."""
    filters = [
        column == value
        for column, value in (
            (Image.name, wanted.name),
            (Image.state, wanted.state),
            (Image.identifier, wanted.identifier),
            (Image.digest, wanted.digest),
        )
        if value is not None
    ]
    if wanted.owner is not None:
        filters.append(Image.owner_id.in_(select(User.id).where(User.name == wanted.owner)))
    branches = [filters]
    if not caller.sees_all:
        asked = Image.id.in_(select(ImageAsker.image_id).where(ImageAsker.user_id == caller.id))
        own, public = Image.owner_id == caller.id, Image.visibility == "public"
        unnamed = wanted.name is None and wanted.owner is None  # of what was only asked for neither is told
        branches = [[which, *filters] for which in (own, public, *([asked] if unnamed else []))]
    return page(session, Image, limit=wanted.limit, cursor=wanted.next, branches=branches, options=SHOWN)


@dataclass(frozen=True)
class Shown:
    """What a document says of an image beside its row: how much depends on it, and whether the caller is `close`: its
    owner, one who asked for it, or an admin; and whether its owner and name are for the caller."""

    pins: int
    close: bool
    named: bool


def shown(session: Session, caller: Caller, found: Collection[Image]) -> dict[UUID, Shown]:
    identifiers = [image.id for image in found]
    depending = holds.counts(session, identifiers)
    mine = ImageAsker.user_id == caller.id
    asked = set(session.scalars(select(ImageAsker.image_id).where(mine, ImageAsker.image_id.in_(identifiers))))
    return {image.id: _shown(caller, image, depending.get(image.id, 0), image.id in asked) for image in found}


def _shown(caller: Caller, image: Image, pins: int, asked: bool) -> Shown:
    own = image.owner_id == caller.id
    return Shown(pins, caller.is_admin or own or asked, caller.sees_all or own or image.visibility == "public")


def safe(reference: str) -> str:
    """A reference without what may be secret in it: user, password and query of a URL."""
    scheme, found, rest = reference.partition("://")
    rest = re.split(r"[?#]", rest if found else scheme)[0]
    host, slash, path = rest.partition("/")
    return (f"{scheme}://" if found else "") + host.rpartition("@")[2] + slash + path


# ---------------------------------------------------------------- create


def create(session: Session, settings: Settings, caller: Caller, body: ImageCreate) -> Operation | Image:
    """From one of a reference, a volume, a snapshot; or a place for an upload, which needs no operation yet."""
    sources = [name for name in ("reference", "volume", "snapshot", "upload") if getattr(body, name) is not None]
    if len(sources) != 1:
        raise invalid("/reference", "one-source", "Name one of reference, volume, snapshot and upload.")
    if body.checksum is not None and body.reference is None:
        raise invalid("/checksum", "no-reference", "A checksum belongs to a reference; that of an upload stands in it.")
    if body.reference is not None:
        told = body.reference, body.checksum, body.name, body.visibility
        image, operation = ask(session, settings, caller, *told)
        return operation or operations.enqueue(session, "image.join", caller, new_id(), ("image", image.id))
    if body.upload is not None:
        return _expect(session, settings, caller, body)
    return _copy(session, settings, caller, body)


def ask(
    session: Session,
    settings: Settings,
    caller: Caller,
    reference: str,
    checksum: str | None,
    name: str | None = None,
    visibility: str | None = None,
) -> tuple[Image, Operation | None]:
    """The one image of the reference, and the operation that fetches it: begun by this request, or joined. No operation
    when the image is there: the caller then sees to it that it is judged before it is used.

    The image's row is held, so that it is there until the transaction ends.
    """
    key = request_key(reference, checksum)
    for _ in range(TRIES):
        image = session.scalar(_of_key(key))
        begun: tuple[Image, Operation | None] | None
        if image is None:
            begun = _begin(session, settings, caller, reference, checksum, name, visibility)
        elif image.state == "available":
            begun = (image, None) if holds.hold(session, image.id, "available") else None
        elif image.state == "fetching":
            begun = _join(session, caller, image)
        else:
            begun = _begin_again(session, settings, caller, image)
        if begun:
            return begun
    raise conflict("changed-meanwhile", "The image was changed by others all the time; try again.")


def request_key(reference: str, checksum: str | None) -> str:
    """By which requests for the same are known."""
    return hashlib.sha256(json.dumps([reference, checksum]).encode()).hexdigest()


def _of_key(key: str) -> Any:
    """The row that counts: the live one, of which there is one at most, before those in error."""
    wanted = select(Image).where(Image.request_key == key, Image.state.in_(("fetching", "available", "error")))
    newest = wanted.order_by(Image.state == "error", Image.id.desc()).limit(1).options(*SHOWN)
    return newest.execution_options(populate_existing=True)


def _begin(
    session: Session,
    settings: Settings,
    caller: Caller,
    reference: str,
    checksum: str | None,
    name: str | None,
    visibility: str | None,
) -> tuple[Image, Operation] | None:
    """None when somebody else began at the same moment."""
    key = request_key(reference, checksum)
    image = _row(caller, name, "fetching", "reference", reference=reference, checksum=checksum, request_key=key)
    if not add_once(session, image):
        return None
    record(session, caller.actor, "image.create", ("image", image.id), reference=safe(reference), name=name)
    return image, _fetch(session, settings, caller, image, visibility)


def _fetch(
    session: Session, settings: Settings, caller: Caller, image: Image, visibility: str | None = None
) -> Operation:
    _require_patience(session, settings, caller)
    operation = operations.enqueue(session, "image.fetch", caller, image.id, ("image", image.id), visibility=visibility)
    _take_part(session, caller, image, operation)
    return operation


def _require_patience(session: Session, settings: Settings, caller: Caller) -> None:
    """Problem 409 when the caller has as much open in the lane of images as one may. It keeps the queue short, and is
    no quota: of requests at the same moment a few more may pass. What others began and the caller joined is theirs."""
    mine = (Operation.principal_id == caller.id, Operation.lane == "image", Operation.state.in_(OPEN))
    begun = session.scalar(select(func.count()).where(*mine)) or 0
    if begun >= settings.images.asks and not caller.is_admin:
        detail = f"{begun} images and judgements that you asked for are not done yet: wait for some, or cancel them."
        raise conflict("too-many-asks", detail)


def _take_part(session: Session, caller: Caller, image: Image, operation: Operation) -> None:
    add_once(session, ImageAsker(image_id=image.id, user_id=caller.id))
    operations.watch(session, operation, caller)


def _join(session: Session, caller: Caller, image: Image) -> tuple[Image, Operation] | None:
    """None when the fetch has ended since: what became of the image is to be looked at again."""
    if not holds.hold(session, image.id, "fetching"):
        return None
    open_one = select(Operation).where(
        Operation.resource_id == image.id, Operation.kind == "image.fetch", Operation.state.in_(OPEN)
    )
    operation = session.scalar(open_one.limit(1))
    if operation is None:
        return None
    _take_part(session, caller, image, operation)
    record(session, caller.actor, "image.join", ("image", image.id), operation=str(operation.id))
    return image, operation


def _begin_again(session: Session, settings: Settings, caller: Caller, image: Image) -> tuple[Image, Operation] | None:
    """One that was there and was lost is fetched anew under the same id: volumes made from it name that."""
    try:
        with session.begin_nested():
            if not transition(session, Image, image.id, "fetching", only_from=("error",), error=None, facts=None):
                return None
    except IntegrityError:
        return None  # another row of the same request lives by now
    session.refresh(image)
    record(session, caller.actor, "image.refetch", ("image", image.id))
    return image, _fetch(session, settings, caller, image)


def add_once(session: Session, row: Any) -> bool:
    """Add a row that somebody else may have added already; whether it was this call."""
    try:
        with session.begin_nested():
            session.add(row)
            session.flush()
    except IntegrityError:
        return False
    return True


def _row(caller: Caller, name: str | None, state: str, origin_kind: str, **values: Any) -> Image:
    moment = now()
    defaults: dict[str, Any] = {"visibility": "private", "received": 0, "charged": 0, "version": 1}
    stamps = {"used_at": moment, "created_at": moment, "updated_at": moment}
    given = {"id": new_id(), "name": name, "state": state, "owner_id": caller.id, "origin_kind": origin_kind}
    return Image(**{**given, **defaults, **stamps, **values})


def _expect(session: Session, settings: Settings, caller: Caller, body: ImageCreate) -> Image:
    """A place for an upload: charged with what is going to be sent, later with what is kept of it."""
    assert body.upload is not None
    told = body.upload
    if told.size > settings.images.max_source_size:
        raise invalid("/upload/size", "too-large", "This site takes no images of that size.")
    capacity.reserve_kept(session, settings, caller.id, told.size)
    capacity.require_room_to_upload(session, settings, told.size)
    image = _row(
        caller, body.name, "receiving", "upload", visibility=body.visibility or "private", charged=told.size,
        checksum=told.checksum, upload=told.model_dump(mode="json"),
    )  # fmt: skip
    session.add(image)
    session.flush()
    record(session, caller.actor, "image.create", ("image", image.id), name=body.name, size=told.size)
    return session.get_one(Image, image.id, options=SHOWN, populate_existing=True)


def _copy(session: Session, settings: Settings, caller: Caller, body: ImageCreate) -> Operation:
    """An image of a volume's or snapshot's bytes, charged with its size until it is known what is kept of it."""
    source = _source(session, caller, body)
    kind = "snapshot" if isinstance(source, Snapshot) else "volume"
    if source.size > settings.images.max_size:
        raise conflict("image-too-large", f"The {kind} is larger than images may be here.")
    _require_patience(session, settings, caller)
    capacity.reserve_kept(session, settings, caller.id, source.size)
    image = _row(
        caller, body.name, "fetching", kind, origin_id=source.id, visibility=body.visibility or "private",
        charged=source.size,
    )  # fmt: skip
    session.add(image)
    session.flush()
    record(session, caller.actor, "image.create", ("image", image.id), name=body.name, **{kind: str(source.id)})
    operation = operations.enqueue(session, "image.from-volume", caller, image.id, ("image", image.id))
    operations.watch(session, operation, caller)
    return operation


def _source(session: Session, caller: Caller, body: ImageCreate) -> Volume | Snapshot:
    if body.volume is not None:
        volume = volumes.find(session, caller, body.volume)
        volumes.hold_for_copy(session, volume, "clone-needs-detach")
        return volume
    assert body.snapshot is not None
    return volumes.hold_snapshot(session, volumes.find_snapshot(session, caller, body.snapshot))


# ---------------------------------------------------------------- judgements


def judge(session: Session, settings: Settings, caller: Caller, body: JudgementCreate) -> Operation:
    """What the policy says to a reference; nothing is downloaded, and no image made."""
    _require_patience(session, settings, caller)
    subject = new_id()
    record(session, caller.actor, "image.judge", reference=safe(body.reference))
    given = {"reference": body.reference, "checksum": body.checksum}
    return operations.enqueue(session, "image.judge", caller, subject, ("judgement", subject), **given)


# ---------------------------------------------------------------- change, delete


def not_available(image: Image) -> Problem:
    return conflict("image-not-available", f"Image {image.id} is {image.state}; it must be available.")


def changed(what: str) -> Problem:
    return Problem(412, "precondition-failed", f"The {what} has changed since you read it; read it again.")


def update_record(session: Session, caller: Caller, identifier: UUID, body: ImageUpdate, version: int | None) -> Image:
    """Rename, publish. `version`: If-Match, or None."""
    image = find(session, caller, identifier)
    require_owner(caller, image)
    plain = {name: getattr(body, name) for name in ("name", "visibility") if name in body.model_fields_set}
    unchanged = () if version is None else (Image.version == version,)
    statement = (
        update(Image)
        .where(Image.id == image.id, Image.state != "deleting", *unchanged)
        .values(**plain, version=Image.version + 1, updated_at=now())
    )
    if change(session, statement) == 0:
        session.refresh(image)
        raise not_available(image) if image.state == "deleting" else changed("image")
    if plain:
        record(session, caller.actor, "image.update", ("image", image.id), **plain)
    session.refresh(image)
    return image


def request_delete(session: Session, caller: Caller, identifier: UUID, version: int | None) -> Operation:
    image = find(session, caller, identifier)
    require_owner(caller, image)
    unchanged = () if version is None else (Image.version == version,)
    if not holds.take_away(session, image.id, *unchanged):
        session.refresh(image)
        if image.state == "deleting":  # somebody was first: this caller's own operation ends with theirs
            return operations.enqueue(session, "image.delete", caller, image.id, ("image", image.id))
        if version is not None and image.version != version:
            raise changed("image")
        if image.state == "fetching":
            raise conflict("image-not-available", f"Image {image.id} is being made; cancel that operation instead.")
        raise holds.refusal(session, caller, image)
    record(session, caller.actor, "image.delete", ("image", image.id), name=image.name, digest=image.digest)
    return operations.enqueue(session, "image.delete", caller, image.id, ("image", image.id))


# ---------------------------------------------------------------- contents


#: How often the reading of an image counts as its use, seconds: who resumes a download asks often.
USED = 60


def read_content(session: Session, caller: Caller, identifier: UUID, first: int, last: int) -> None:
    """Somebody is given the bytes from `first` to `last`: the image was used, and it is told by whom."""
    before = now() - dt.timedelta(seconds=USED)
    change(session, update(Image).where(Image.id == identifier, Image.used_at < before).values(used_at=now()))
    record(session, caller.actor, "image.read", ("image", identifier), first=first, last=last)
