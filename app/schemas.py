"""What goes over the wire: one model per document, the single source of validation and of the OpenAPI description.

Requests forbid unknown members and are validated strictly (a string is no number). Sizes are bytes, times are
UTC in RFC 3339, ids are UUIDs.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic_core import PydanticCustomError

from iscsi.names import NAME_MAX, BadName, validate_initiator

MIN_SIZE = 1 << 20
#: Past every real volume, within every database's BIGINT and JSON's exact integers (RFC 8259 §6).
MAX_SIZE = 1 << 50

VolumeStateName = Literal["creating", "available", "in-use", "reverting", "deleting", "error"]
SnapshotStateName = Literal["creating", "available", "deleting", "error"]
AttachmentStateName = Literal["attaching", "attached", "detaching", "detached", "error"]
ImageStateName = Literal["receiving", "fetching", "available", "deleting", "error"]
OperationStateName = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Role = Literal["user", "node", "admin"]
Mode = Literal["rw", "ro"]
Visibility = Literal["private", "public"]


def _integral(value: object) -> object:
    """JSON Schema counts 1.0 as an integer; so do we."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _utc(value: dt.datetime) -> dt.datetime:
    return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def _initiator(value: str) -> str:
    try:
        return validate_initiator(value)
    except BadName as error:
        raise PydanticCustomError("bad-initiator", "{reason}", {"reason": str(error)}) from None


#: `iscsi.names` as one expression, for those who only read the description.
_INITIATOR = {
    "minLength": 15,
    "maxLength": NAME_MAX,
    "pattern": (
        r"^(iqn\.[0-9]{4}-(0[1-9]|1[0-2])(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?){2,}(:[a-z0-9.:-]+)?"
        r"|eui\.[0-9a-f]{16}|naa\.([0-9a-f]{16}|[0-9a-f]{32}))$"
    ),
    "examples": ["iqn.2026-11.org.example:host-1"],
}

#: What names an image: a Marketplace identifier, or the URL of a metadata entry or of the image itself.
_REFERENCE = {"examples": ["BEE8-MMAw-Lk_IgsEExAy3d9R8h"]}
_DIGEST = r"^((sha1:)?[0-9A-Fa-f]{40}|(sha256:)?[0-9A-Fa-f]{64}|(sha512:)?[0-9A-Fa-f]{128})$"
_BY_LENGTH = {40: "sha1", 64: "sha256", 128: "sha512"}


def _checksum(value: str) -> str:
    """`ALGORITHM:HEX`, in lower case."""
    digits = value.rpartition(":")[2].lower()
    return f"{_BY_LENGTH[len(digits)]}:{digits}"


#: Stands last in an annotation: bounds to the left of it are part of the description, to the right they are not.
Integral = BeforeValidator(_integral)
#: Whole blocks of 512 bytes, the unit in which SCSI tells a capacity: what is shown is what a machine sees.
Size = Annotated[
    int,
    Field(ge=MIN_SIZE, le=MAX_SIZE, multiple_of=512, description="bytes, a multiple of 512", examples=[1 << 30]),
    Integral,
]
Instant = Annotated[dt.datetime, AfterValidator(_utc)]
#: One line of printable text without control characters.
Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")]
#: Opaque to clients. Its form is told so that what cannot be one is refused by name.
Cursor = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{21}[AQgw]$")]
#: In lower case, the normal form; capitals are folded.
Initiator = Annotated[str, AfterValidator(_initiator), Field(json_schema_extra=_INITIATOR)]
Reference = Annotated[
    str, StringConstraints(min_length=1, max_length=2048, pattern=r"^[!-~]+$"), Field(json_schema_extra=_REFERENCE)
]
Checksum = Annotated[
    str,
    StringConstraints(pattern=_DIGEST),
    AfterValidator(_checksum),
    Field(description="`sha256:HEX`, `sha512:HEX` or `sha1:HEX`; or the hex digits alone, told apart by their number"),
]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{27}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Secret = Annotated[str, StringConstraints(min_length=12, max_length=256)]
#: The header by which a repeated mutation is recognised.
IdempotencyKey: TypeAdapter[str] = TypeAdapter(
    Annotated[str, StringConstraints(min_length=8, max_length=255, pattern=r"^[!-~]+$")]
)


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Document(BaseModel):
    model_config = ConfigDict(from_attributes=True)


# ---------------------------------------------------------------- problems (RFC 9457)


class FieldError(Document):
    """One thing wrong with the request: `pointer` into the body (RFC 6901), or `name` of a parameter or header."""

    pointer: str | None = None
    name: str | None = None
    code: str
    detail: str


class ProblemDocument(Document):
    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str
    errors: list[FieldError] = []


# ---------------------------------------------------------------- parameters


class DryRun(Request):
    model_config = ConfigDict(extra="forbid", strict=False)
    dry_run: bool = Field(False, description="answer with the plan and change nothing")


class Paging(Request):
    model_config = ConfigDict(extra="forbid", strict=False)
    limit: int = Field(50, ge=1, le=1000, description="items of a page at most")
    next: Cursor | None = Field(None, description="the `next` of the page before")


class VolumeFilter(Paging):
    name: Name | None = Field(None, description="exactly this name")
    state: VolumeStateName | None = Field(None, description="in this state")
    owner: Label | None = Field(None, description="of this user")


class SnapshotFilter(Paging):
    name: Name | None = Field(None, description="exactly this name")
    volume: UUID | None = Field(None, description="of this volume, also when that is gone")


class ImageFilter(Paging):
    name: Name | None = Field(None, description="exactly this name")
    state: ImageStateName | None = Field(None, description="in this state")
    identifier: Identifier | None = Field(None, description="with this Marketplace identifier")
    digest: Digest | None = Field(None, description="whose file has this SHA-256")
    owner: Label | None = Field(None, description="of this user")


class AttachmentFilter(Paging):
    volume: UUID | None = Field(None, description="of this volume")
    node: Name | None = Field(None, description="on this node")
    state: AttachmentStateName | None = Field(None, description="in this state")


class EventFilter(Paging):
    resource: UUID | None = Field(None, description="of this resource")
    kind: Label | None = Field(None, description="of this kind, such as volume.create")


class OperationFilter(Paging):
    state: OperationStateName | None = Field(None, description="in this state")
    resource: UUID | None = Field(None, description="on this resource")


class Wait(Request):
    model_config = ConfigDict(extra="forbid", strict=False)
    wait: float = Field(0, ge=0, le=30, allow_inf_nan=False, description="seconds to wait for the end")


class Detach(DryRun):
    force: bool = Field(False, description="without the node's consent (admin); never without the drain")


class ShareTarget(DryRun):
    group: Label = Field(description="the group whose share ends")


# ---------------------------------------------------------------- requests


def _given(name: str, schema: dict[str, Any], *others: str) -> dict[str, Any]:
    """JSON Schema for: this member is there, and not null; the others are not there, or null."""
    absent: dict[str, Any] = {other: {"type": "null"} for other in others if other != name}
    return {"required": [name], "properties": {name: schema, **absent}}


_UUID: dict[str, Any] = {"type": "string", "format": "uuid"}
_SIZE: dict[str, Any] = {"type": "integer", "minimum": MIN_SIZE, "maximum": MAX_SIZE}


class VolumeCreate(Request):
    """An empty volume, or a copy of exactly one of `image`, `snapshot` and `volume`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                _given("size", _SIZE, "image", "snapshot", "volume", "checksum"),
                _given("image", {"type": "string"}, "snapshot", "volume"),
                _given("snapshot", _UUID, "image", "volume", "checksum"),
                _given("volume", _UUID, "image", "snapshot", "checksum"),
            ],
        }
    )
    name: Name | None = None
    size: Size | None = Field(None, description="bytes; may be left out for a copy, which then has its source's size")
    visibility: Visibility = "private"
    pool: Label | None = Field(None, description="the default pool when left out")
    image: Reference | None = Field(None, description="an image's id, or a reference: it is fetched if need be")
    checksum: Checksum | None = Field(None, description="that the image of the reference must have")
    snapshot: UUID | None = None
    volume: UUID | None = None


class Upload(Request):
    """What is going to be sent."""

    size: Annotated[int, Field(ge=1, le=MAX_SIZE, description="bytes, as they are sent"), Integral]
    checksum: Checksum = Field(description="of the bytes as they are sent, or of what they decompress to")
    format: Literal["raw", "qcow2"]
    compression: Literal["gz", "bz2", "xz", "zst"] | None = None


_SOURCES = ("reference", "volume", "snapshot", "upload")


class ImageCreate(Request):
    """An image from exactly one of `reference`, `volume`, `snapshot` and `upload`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                _given("reference", {"type": "string"}, *_SOURCES),
                _given("volume", _UUID, *_SOURCES, "checksum"),
                _given("snapshot", _UUID, *_SOURCES, "checksum"),
                _given("upload", {"type": "object"}, *_SOURCES, "checksum"),
            ],
        }
    )
    name: Name | None = None
    visibility: Visibility | None = Field(
        None, description="left out: public for what a Marketplace tells of, private for everything else"
    )
    reference: Reference | None = None
    checksum: Checksum | None = Field(None, description="that the image of the reference must have")
    volume: UUID | None = None
    snapshot: UUID | None = None
    upload: Upload | None = None


def _no_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class VolumeUpdate(Request):
    """What is left out stays as it is."""

    name: Name | None = Field(None, description="null takes the name away")
    visibility: Visibility = Field("private", json_schema_extra=_no_default)
    size: Size | None = Field(None, description="bytes; larger than now")


class ImageUpdate(Request):
    """What is left out stays as it is."""

    name: Name | None = Field(None, description="null takes the name away")
    visibility: Visibility = Field("private", json_schema_extra=_no_default)


class JudgementCreate(Request):
    reference: Reference
    checksum: Checksum | None = None


class SnapshotCreate(Request):
    name: Name | None = None


class Revert(Request):
    snapshot: UUID


class ShareUpdate(Request):
    group: Label
    mode: Mode = "ro"


class AttachmentCreate(Request):
    instance_id: Name
    node: Name
    initiator: Initiator
    mode: Mode = "rw"
    mutual_chap: bool = Field(False, description="the target proves itself to the initiator as well")


class Empty(Request):
    """No members."""


class UserCreate(Request):
    name: Label
    role: Literal["user", "admin"] = "user"
    password: Secret | None = None


class UserUpdate(Request):
    password: Secret | None = None
    enabled: bool | None = None


class NodeCreate(Request):
    name: Label
    initiator: Initiator


class NodeUpdate(Request):
    initiator: Initiator | None = None
    enabled: bool | None = None


class TokenCreate(Request):
    description: Name | None = None
    expires_in: Annotated[int, Field(ge=60, le=10 * 366 * 86400), Integral] | None = Field(None, description="seconds")
    user: Label | None = Field(None, description="for whom (admin); yourself when left out")


class GroupCreate(Request):
    name: Label


class GroupUpdate(Request):
    members: list[Label] = Field(max_length=1000, description="names of all its members from now on")


class QuotaUpdate(Request):
    """null is the site's default."""

    size: Annotated[int, Field(ge=0, le=MAX_SIZE), Integral] | None = Field(None, description="bytes")
    count: Annotated[int, Field(ge=0, le=1_000_000), Integral] | None = Field(None, description="volumes and snapshots")


# ---------------------------------------------------------------- answers


class Auth(Document):
    username: str
    password: str
    mutual_username: str | None = None
    mutual_password: str | None = None


class ConnectionDocument(Document):
    driver: Literal["iscsi"] = "iscsi"
    portal: str
    target: str
    lun: int
    auth: Auth


class AttachmentDocument(Document):
    id: UUID
    volume_id: UUID
    instance_id: str
    node: str
    initiator: str
    mode: Mode
    state: AttachmentStateName
    direct: bool
    error: str | None = None
    created_at: Instant
    attached_at: Instant | None = None
    detached_at: Instant | None = None


class AttachmentWithConnection(AttachmentDocument):
    connection: ConnectionDocument | None = None


class Origin(Document):
    kind: Literal["image", "snapshot", "volume"]
    id: UUID


class VolumeDocument(Document):
    id: UUID
    name: str | None
    size: int
    state: VolumeStateName
    error: str | None = None
    owner: str
    visibility: Visibility
    pool: str
    origin: Origin | None = None
    serial: str
    created_at: Instant
    updated_at: Instant
    attachments: list[AttachmentDocument]


class SnapshotDocument(Document):
    id: UUID
    name: str | None
    volume_id: UUID
    size: int
    state: SnapshotStateName
    error: str | None = None
    owner: str
    pool: str
    created_at: Instant


class ImageOrigin(Document):
    kind: Literal["reference", "upload", "volume", "snapshot"]
    id: UUID | None = None


class ImageDocument(Document):
    id: UUID
    name: str | None = Field(description="its owner's, like the owner not told of another's private image")
    state: ImageStateName
    error: str | None = None
    owner: str | None
    visibility: Visibility
    origin: ImageOrigin
    reference: str | None = Field(None, description="told to who asked for it and to admins: a URL can hold secrets")
    identifier: str | None = None
    digest: str | None = Field(None, description="SHA-256 of the qcow2 file")
    size: int | None = Field(None, description="bytes that a machine sees")
    file_size: int | None = Field(None, description="bytes of the qcow2 file")
    allocated: int | None = Field(None, description="bytes it really takes in the cache")
    source_format: str | None = None
    source_digests: dict[str, str] = Field({}, description="of the image it was made from, decompressed")
    title: str | None = None
    os: str | None = None
    endorser: str | None = None
    pins: int = Field(description="how much depends on it: live overlays, wishes of admins, cases, volumes")
    used_at: Instant
    created_at: Instant
    updated_at: Instant


class UploadStatus(Document):
    received: int = Field(description="bytes that are here, from the first on")
    size: int = Field(description="bytes in all")


class PinDocument(Document):
    """An image that stays while this is there. `path` is the file to put an overlay on, as the service sees it."""

    name: str
    kind: Literal["overlay", "admin", "case"]
    digest: str
    path: str
    format: Literal["qcow2"] = "qcow2"


class PinEntry(Document):
    name: str
    kind: Literal["overlay", "admin", "case"]
    principal: str
    created_at: Instant


class PinList(Document):
    items: list[PinEntry]


class EntryDocument(Document):
    """What one endorser, or the asker, says about an image."""

    source: str
    identifier: str | None = None
    size: int | None = None
    checksums: dict[str, str] = {}
    format: str | None = None
    compression: str | None = None
    locations: list[str] = []
    endorser: str | None = None
    signed: bool = False
    created_at: Instant | None = None
    valid_until: Instant | None = None
    deprecated: str | None = None
    title: str | None = None
    os: str | None = None
    os_version: str | None = None
    architecture: str | None = None
    version: str | None = None


class RefusalDocument(Document):
    entry: EntryDocument
    rule: str
    detail: str


class JudgementDocument(Document):
    reference: str
    passed: EntryDocument | None = None
    refused: list[RefusalDocument] = []


class ShareDocument(Document):
    group: str
    mode: Mode


class Resource(Document):
    kind: str
    id: UUID


class OperationError(Document):
    code: str
    detail: str


class OperationDocument(Document):
    id: UUID
    kind: str
    state: OperationStateName
    progress: int = Field(ge=0, le=100, description="percent")
    message: str | None = None
    error: OperationError | None = None
    result: dict[str, Any] | None = Field(None, description="what it found, where that is not the resource itself")
    resource: Resource
    created_at: Instant
    started_at: Instant | None = None
    finished_at: Instant | None = None


class UserDocument(Document):
    id: UUID
    name: str
    role: Role
    enabled: bool
    created_at: Instant


class NodeDocument(Document):
    id: UUID
    name: str
    initiator: str
    enabled: bool
    created_at: Instant


class TokenDocument(Document):
    id: UUID
    user: str
    description: str | None = None
    created_at: Instant
    expires_at: Instant | None = None
    revoked_at: Instant | None = None


class NewToken(TokenDocument):
    token: str | None = Field(None, description="shown once; null when a repeated request is answered again")


class GroupDocument(Document):
    id: UUID
    name: str
    members: list[str]
    created_at: Instant


class QuotaDocument(Document):
    user: str
    size: int = Field(description="bytes allowed")
    count: int = Field(description="volumes and snapshots allowed")
    used_size: int
    used_count: int


class PoolDocument(Document):
    name: str
    driver: str
    state: Literal["active", "unusable"]
    reason: str | None = None
    live_clone: bool = Field(description="snapshots and clones of attached volumes are possible")
    granularity: int = Field(description="sizes of volumes are rounded up to multiples of this many bytes")
    size: int
    free: int
    allocated: int = Field(description="bytes really used by volumes and snapshots")
    promised: int = Field(description="sum of the sizes of volumes and snapshots")
    overcommit_ratio: float
    low_space: int = Field(description="bytes; below this much free the pool takes no new work")
    alarm: str | None = None
    updated_at: Instant | None = None


class EventDocument(Document):
    id: UUID
    at: Instant
    kind: str
    actor: str
    address: str | None
    resource: Resource | None
    detail: dict[str, Any]
    sequence: int | None = None
    hash: str | None = None


class Whoami(Document):
    id: UUID
    name: str
    role: Role
    groups: list[str]


class Conflict(Document):
    code: str
    detail: str


class Plan(Document):
    """What a mutation would do: its answer under `?dry_run=true`."""

    dry_run: Literal[True] = True
    allowed: bool
    steps: list[str]
    conflicts: list[Conflict]
    quota: QuotaDocument | None = None
    space: PoolDocument | None = None


class VolumePage(Document):
    items: list[VolumeDocument]
    next: str | None = None


class ImagePage(Document):
    items: list[ImageDocument]
    next: str | None = None


class SnapshotPage(Document):
    items: list[SnapshotDocument]
    next: str | None = None


class AttachmentPage(Document):
    items: list[AttachmentDocument]
    next: str | None = None


class OperationPage(Document):
    items: list[OperationDocument]
    next: str | None = None


class EventPage(Document):
    items: list[EventDocument]
    next: str | None = None


class UserPage(Document):
    items: list[UserDocument]
    next: str | None = None


class NodePage(Document):
    items: list[NodeDocument]
    next: str | None = None


class TokenPage(Document):
    items: list[TokenDocument]
    next: str | None = None


class GroupPage(Document):
    items: list[GroupDocument]
    next: str | None = None


class PoolPage(Document):
    items: list[PoolDocument]
    next: str | None = None


class ShareList(Document):
    items: list[ShareDocument]


class Health(Document):
    status: str
    detail: dict[str, str] = {}
