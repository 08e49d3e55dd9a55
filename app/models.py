"""The tables. What must never be true is made impossible here, by the schema, and not by code that checks first."""

from __future__ import annotations

import datetime as dt
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAMING = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[dt.datetime]):
    """Aware UTC in Python; SQLite, which knows no zones, stores the UTC reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        value = value.astimezone(dt.UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def one_of(*names: str) -> Enum:
    """A text column that Python checks; the database does not, so that a new state needs no table rebuild."""
    return Enum(*names, native_enum=False, create_constraint=False, length=32)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dt.datetime: UtcDateTime, dict[str, Any]: JSON, int: BigInteger}  # noqa: RUF012


class User(Base):
    """A principal: a person, a node (hypervisor) or an admin, with what they hold against their quota."""

    __tablename__ = "users"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(one_of("user", "node", "admin"))
    password_hash: Mapped[str | None] = mapped_column(String(256))
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    initiator: Mapped[str | None] = mapped_column(String(223), unique=True)
    quota_size: Mapped[int | None]
    quota_count: Mapped[int | None]
    used_size: Mapped[int] = mapped_column(default=0)
    used_count: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime]


class Token(Base):
    """An API token: only the SHA-256 of its 256 random bits is kept."""

    __tablename__ = "tokens"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    description: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    user: Mapped[User] = relationship()


class Group(Base):
    __tablename__ = "groups"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[dt.datetime]


class GroupMember(Base):
    __tablename__ = "group_members"
    group_id: Mapped[UUID] = mapped_column(ForeignKey("groups.id", ondelete="CASCADE"), primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, index=True)


class Pool(Base):
    """What the worker last saw of a pool, and the sum of the sizes promised in it."""

    __tablename__ = "pools"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    pool_id: Mapped[UUID | None]
    driver: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(one_of("active", "unusable"))
    reason: Mapped[str | None] = mapped_column(Text)
    live_clone: Mapped[bool] = mapped_column(Boolean, default=False)
    granularity: Mapped[int] = mapped_column(default=1)
    size: Mapped[int] = mapped_column(default=0)
    free: Mapped[int] = mapped_column(default=0)
    allocated: Mapped[int] = mapped_column(default=0)
    promised: Mapped[int] = mapped_column(default=0)
    overcommit_ratio: Mapped[float]
    low_space: Mapped[int] = mapped_column(default=0)
    alarm: Mapped[str | None] = mapped_column(Text)
    updated_at: Mapped[dt.datetime | None]


class Volume(Base):
    """A user's block device.

    `held_mode` says how it is attached (NULL: not at all); `attachments.held_mode` must equal it (composite foreign
    key), and at most one of those may be `rw` (partial unique index): two writers, or a writer beside readers, cannot
    be written down. `readers` counts copies being made from it. `tid` is the target's number, never used again.
    """

    __tablename__ = "volumes"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(128))
    size: Mapped[int]
    new_size: Mapped[int | None]
    state: Mapped[str] = mapped_column(one_of("creating", "available", "in-use", "reverting", "deleting", "error"))
    error: Mapped[str | None] = mapped_column(Text)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"))
    visibility: Mapped[str] = mapped_column(one_of("private", "public"))
    pool: Mapped[str] = mapped_column(ForeignKey("pools.name"))
    origin_kind: Mapped[str | None] = mapped_column(String(16))
    origin_id: Mapped[UUID | None]
    held_mode: Mapped[str | None] = mapped_column(one_of("rw", "ro"))
    readers: Mapped[int] = mapped_column(Integer, default=0)
    tid: Mapped[int] = mapped_column(unique=True)
    version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[dt.datetime]
    updated_at: Mapped[dt.datetime]
    owner: Mapped[User] = relationship()
    attachments: Mapped[list[Attachment]] = relationship(
        primaryjoin="and_(Volume.id == Attachment.volume_id, Attachment.held_mode.is_not(None))",
        foreign_keys="Attachment.volume_id",
        viewonly=True,
        order_by="Attachment.id",
    )
    __table_args__ = (
        UniqueConstraint("id", "held_mode"),
        CheckConstraint("readers >= 0", name="readers"),
        Index("ix_volumes_origin", "origin_id"),
        # A page of a list is a range of one of these: whose volumes, perhaps of which state or name, in order of id.
        *(
            Index(f"ix_volumes_{'_'.join(columns)}", *columns, "id")
            for columns in (
                ("owner_id",),
                ("owner_id", "state"),
                ("owner_id", "name"),
                ("visibility",),
                ("visibility", "state"),
                ("visibility", "name"),
                ("state",),
                ("name",),
            )
        ),
    )


class Share(Base):
    """A volume that the members of a group may use as if it were public to them (`ro`), or write to (`rw`)."""

    __tablename__ = "shares"
    volume_id: Mapped[UUID] = mapped_column(ForeignKey("volumes.id", ondelete="CASCADE"), primary_key=True)
    group_id: Mapped[UUID] = mapped_column(ForeignKey("groups.id", ondelete="CASCADE"), primary_key=True)
    mode: Mapped[str] = mapped_column(one_of("rw", "ro"))
    __table_args__ = (Index("ix_shares_group", "group_id", "volume_id"),)


class Snapshot(Base):
    """A volume's bytes at one moment. It outlives its volume, so `volume_id` is no foreign key."""

    __tablename__ = "snapshots"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(128))
    volume_id: Mapped[UUID] = mapped_column(index=True)
    size: Mapped[int]
    state: Mapped[str] = mapped_column(one_of("creating", "available", "deleting", "error"))
    error: Mapped[str | None] = mapped_column(Text)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"))
    pool: Mapped[str] = mapped_column(ForeignKey("pools.name"))
    readers: Mapped[int] = mapped_column(Integer, default=0)
    version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[dt.datetime]
    updated_at: Mapped[dt.datetime]
    owner: Mapped[User] = relationship()
    __table_args__ = (
        CheckConstraint("readers >= 0", name="readers"),
        Index("ix_snapshots_owner", "owner_id", "id"),
        Index("ix_snapshots_name", "name", "id"),
    )


class Attachment(Base):
    """One volume to one instance on one node; `principal_id` is who attached and alone may read the secret."""

    __tablename__ = "attachments"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    volume_id: Mapped[UUID] = mapped_column(ForeignKey("volumes.id", ondelete="CASCADE"), index=True)
    principal_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"))
    instance_id: Mapped[str] = mapped_column(String(128))
    node: Mapped[str] = mapped_column(String(128))
    initiator: Mapped[str] = mapped_column(String(223))
    mode: Mapped[str] = mapped_column(one_of("rw", "ro"))
    held_mode: Mapped[str | None] = mapped_column(one_of("rw", "ro"))
    direct: Mapped[bool] = mapped_column(Boolean)
    state: Mapped[str] = mapped_column(one_of("attaching", "attached", "detaching", "detached", "error"))
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[dt.datetime]
    attached_at: Mapped[dt.datetime | None]
    detached_at: Mapped[dt.datetime | None]
    volume: Mapped[Volume] = relationship(foreign_keys="Attachment.volume_id", viewonly=True)
    principal: Mapped[User] = relationship()
    connection: Mapped[Connection | None] = relationship(viewonly=True)
    __table_args__ = (
        ForeignKeyConstraint(["volume_id", "held_mode"], ["volumes.id", "volumes.held_mode"]),
        CheckConstraint("held_mode IS NULL OR held_mode = mode", name="held"),
        CheckConstraint("(held_mode IS NULL) = (state = 'detached')", name="held_until_detached"),
        Index(
            "uq_attachments_one_writer",
            "volume_id",
            unique=True,
            sqlite_where=text("held_mode = 'rw'"),
            postgresql_where=text("held_mode = 'rw'"),
        ),
        Index(
            "uq_attachments_one_per_initiator",
            "volume_id",
            "initiator",
            unique=True,
            sqlite_where=text("held_mode IS NOT NULL"),
            postgresql_where=text("held_mode IS NOT NULL"),
        ),
        Index("ix_attachments_node", "node", "id"),
        Index("ix_attachments_principal", "principal_id", "id"),
    )


class Connection(Base):
    """How an attachment is reached. `secret` is AES-GCM under key `key_id`, the attachment's id as associated data."""

    __tablename__ = "connections"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    attachment_id: Mapped[UUID] = mapped_column(ForeignKey("attachments.id", ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(one_of("primary", "migration-target"))
    initiator: Mapped[str] = mapped_column(String(223))
    networks: Mapped[list[str]] = mapped_column(JSON)
    portal: Mapped[str] = mapped_column(String(128))
    username: Mapped[str] = mapped_column(String(64), unique=True)
    mutual: Mapped[bool] = mapped_column(Boolean)
    key_id: Mapped[str] = mapped_column(String(32))
    secret: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[dt.datetime]
    __table_args__ = (UniqueConstraint("attachment_id", "role"),)

    @property
    def mutual_username(self) -> str:
        """The name under which the target proves itself to this initiator."""
        return "t" + self.username[1:]


class Operation(Base):
    """Long work that a client can watch. Committed with the resource it works on.

    One *running* operation per subject and lane (partial unique index); others queue. `fence` grows with every claim
    and stands in every UPDATE of the worker that claimed it: a worker that lost its lease can write nothing more.
    """

    __tablename__ = "operations"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(64))
    lane: Mapped[str] = mapped_column(one_of("data", "export", "image"))
    state: Mapped[str] = mapped_column(one_of("queued", "running", "succeeded", "failed", "cancelled"))
    subject_id: Mapped[UUID]
    resource_kind: Mapped[str] = mapped_column(String(32))
    resource_id: Mapped[UUID] = mapped_column(index=True)
    principal_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    actor: Mapped[str] = mapped_column(String(64), default="system")
    address: Mapped[str | None] = mapped_column(String(64))
    parameters: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    progress: Mapped[int] = mapped_column(Integer, default=0)
    message: Mapped[str | None] = mapped_column(Text)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_detail: Mapped[str | None] = mapped_column(Text)
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    fence: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[dt.datetime | None]
    not_before: Mapped[dt.datetime]
    created_at: Mapped[dt.datetime]
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    __table_args__ = (
        Index(
            "uq_operations_one_running",
            "subject_id",
            "lane",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index(
            "ix_operations_open",
            "lane",
            "id",
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        Index(
            "ix_operations_open_subject",
            "subject_id",
            "lane",
            "id",
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        Index("ix_operations_principal", "principal_id", "id"),
    )


class OperationWatcher(Base):
    """Whoever asked for the same at the same time has a part in the one operation, and may look at it.

    Who no longer is `waiting` asked for its end; it is cancelled when nobody waits any more.
    """

    __tablename__ = "operation_watchers"
    operation_id: Mapped[UUID] = mapped_column(ForeignKey("operations.id", ondelete="CASCADE"), primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    waiting: Mapped[bool] = mapped_column(Boolean, default=True)
    __table_args__ = (Index("ix_operation_watchers_user", "user_id", "operation_id"),)


class ImageCache(Base):
    """What the worker last saw of the directory of images; `cache_id` is its marker's, so that another one shows."""

    __tablename__ = "image_caches"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    cache_id: Mapped[UUID | None]
    state: Mapped[str] = mapped_column(one_of("active", "unusable"))
    reason: Mapped[str | None] = mapped_column(Text)
    size: Mapped[int] = mapped_column(default=0)
    free: Mapped[int] = mapped_column(default=0)
    allocated: Mapped[int] = mapped_column(default=0)
    alarm: Mapped[str | None] = mapped_column(Text)
    updated_at: Mapped[dt.datetime | None]


class Image(Base):
    """An immutable image. Its bytes are the cached qcow2 named `digest`, which several rows may share.

    `request_key` says which reference and checksum were asked for: at most one row of a key is being fetched or there
    (partial unique index), so that all who ask join it. `verified_by` is the strongest digest that was told,
    "ALGORITHM:HEX"; `facts` is what was said about the image by the entry that passed the policy, and `upload` what the
    uploader said, of whose bytes `received` are here. `digest`, once set, holds the file, whatever the state. `charged`
    are the bytes its owner is charged for: none for an image with a reference, which can be had again.
    """

    __tablename__ = "images"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(128))
    state: Mapped[str] = mapped_column(one_of("receiving", "fetching", "available", "deleting", "error"))
    error: Mapped[str | None] = mapped_column(Text)
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"))
    visibility: Mapped[str] = mapped_column(one_of("private", "public"))
    origin_kind: Mapped[str] = mapped_column(one_of("reference", "upload", "volume", "snapshot"))
    origin_id: Mapped[UUID | None]
    reference: Mapped[str | None] = mapped_column(Text)
    checksum: Mapped[str | None] = mapped_column(String(144))
    request_key: Mapped[str | None] = mapped_column(String(64))
    identifier: Mapped[str | None] = mapped_column(String(27))
    verified_by: Mapped[str | None] = mapped_column(String(144))
    facts: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    upload: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    received: Mapped[int] = mapped_column(default=0)
    source_digests: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    source_format: Mapped[str | None] = mapped_column(String(16))
    digest: Mapped[str | None] = mapped_column(String(64))
    size: Mapped[int | None]
    file_size: Mapped[int | None]
    allocated: Mapped[int | None]
    charged: Mapped[int] = mapped_column(default=0)
    used_at: Mapped[dt.datetime]
    verified_at: Mapped[dt.datetime | None]
    version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[dt.datetime]
    updated_at: Mapped[dt.datetime]
    owner: Mapped[User] = relationship()
    __table_args__ = (
        Index(
            "uq_images_one_per_request",
            "request_key",
            unique=True,
            sqlite_where=text("state IN ('fetching', 'available')"),
            postgresql_where=text("state IN ('fetching', 'available')"),
        ),
        *(
            Index(f"ix_images_{'_'.join(columns)}", *columns, "id")
            for columns in (
                ("owner_id",),
                ("visibility",),
                ("state",),
                ("name",),
                ("identifier",),
                ("digest",),
                ("verified_by",),
                ("request_key",),
            )
        ),
    )


class ImageAsker(Base):
    """Who asked for an image, and so may see it."""

    __tablename__ = "image_askers"
    image_id: Mapped[UUID] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"), primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    __table_args__ = (Index("ix_image_askers_user", "user_id", "image_id"),)


class ImagePin(Base):
    """Somebody depends on the image's file: a live overlay (`name` is its instance), an admin's wish, a case.

    Each principal has pins of its own: of two nodes between which an instance migrates neither ends the other's.
    """

    __tablename__ = "image_pins"
    image_id: Mapped[UUID] = mapped_column(ForeignKey("images.id"), primary_key=True)
    principal_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    kind: Mapped[str] = mapped_column(one_of("overlay", "admin", "case"))
    created_at: Mapped[dt.datetime]
    principal: Mapped[User] = relationship()
    __table_args__ = (Index("ix_image_pins_principal", "principal_id"),)


class GoldenCopy(Base):
    """An image's bytes as a volume of a pool, under `id`, that volumes are cloned from; only an `available` one is."""

    __tablename__ = "golden_copies"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    pool: Mapped[str] = mapped_column(ForeignKey("pools.name"))
    size: Mapped[int]
    state: Mapped[str] = mapped_column(one_of("creating", "available", "deleting"))
    used_at: Mapped[dt.datetime]
    created_at: Mapped[dt.datetime]
    __table_args__ = (UniqueConstraint("digest", "pool"), Index("ix_golden_copies_pool", "pool", "id"))


class Event(Base):
    """One line of the audit trail; `sequence`, `previous` and `hash` are set once, by the sealer."""

    __tablename__ = "events"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[dt.datetime]
    kind: Mapped[str] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(64))
    address: Mapped[str | None] = mapped_column(String(64))
    resource_kind: Mapped[str | None] = mapped_column(String(32))
    resource_id: Mapped[UUID | None]
    detail: Mapped[dict[str, Any]]
    sequence: Mapped[int | None] = mapped_column(unique=True)
    previous: Mapped[str | None] = mapped_column(String(64))
    hash: Mapped[str | None] = mapped_column(String(64))
    __table_args__ = (
        Index("ix_events_resource", "resource_id", "id"),
        Index("ix_events_kind", "kind", "id"),
        Index(
            "ix_events_unsealed",
            "id",
            sqlite_where=text("sequence IS NULL"),
            postgresql_where=text("sequence IS NULL"),
        ),
    )


class IdempotencyKey(Base):
    """A mutation that was answered: the operation to look at, or the answer itself without its secrets."""

    __tablename__ = "idempotency_keys"
    principal_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    operation_id: Mapped[UUID | None]
    status: Mapped[int | None] = mapped_column(Integer)
    body: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[dt.datetime] = mapped_column(index=True)


class Counter(Base):
    """Numbers that are never given twice."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[int]


class WorkerBeat(Base):
    """The worker of a host: alive when `beat_at` is recent; `ready` once everything was rebuilt."""

    __tablename__ = "workers"
    host: Mapped[str] = mapped_column(String(64), primary_key=True)
    pid: Mapped[int]
    ready: Mapped[bool] = mapped_column(Boolean)
    beat_at: Mapped[dt.datetime]
