"""The tables of images: rows, askers, pins, golden copies; who watches an operation, and what it found.

The release before this one goes on running on it: it reads none of the new tables, and knows no operation of the new
lane, which it never claims.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

IMAGE_LISTS = ("owner_id", "visibility", "state", "name", "identifier", "digest", "verified_by", "request_key")
ONE_PER_REQUEST = sa.text("state IN ('fetching', 'available')")


def _one_of(*names: str) -> sa.Enum:
    return sa.Enum(*names, native_enum=False, length=32)


def upgrade() -> None:
    op.add_column("operations", sa.Column("result", sa.JSON(), nullable=True))
    op.create_index("ix_volumes_origin", "volumes", ["origin_id"], unique=False)
    _watchers()
    _caches()
    _images()
    _askers()
    _pins()
    _golden_copies()


def _watchers() -> None:
    op.create_table(
        "operation_watchers",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("waiting", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["operation_id"],
            ["operations.id"],
            name="fk_operation_watchers_operation_id_operations",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_operation_watchers_user_id_users", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("operation_id", "user_id", name="pk_operation_watchers"),
    )
    op.create_index("ix_operation_watchers_user", "operation_watchers", ["user_id", "operation_id"], unique=False)


def _caches() -> None:
    op.create_table(
        "image_caches",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("cache_id", sa.Uuid(), nullable=True),
        sa.Column("state", _one_of("active", "unusable"), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("free", sa.BigInteger(), nullable=False),
        sa.Column("allocated", sa.BigInteger(), nullable=False),
        sa.Column("alarm", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_image_caches"),
    )


def _images() -> None:
    op.create_table(
        "images",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=True),
        sa.Column("state", _one_of("receiving", "fetching", "available", "deleting", "error"), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("visibility", _one_of("private", "public"), nullable=False),
        sa.Column("origin_kind", _one_of("reference", "upload", "volume", "snapshot"), nullable=False),
        sa.Column("origin_id", sa.Uuid(), nullable=True),
        sa.Column("reference", sa.Text(), nullable=True),
        sa.Column("checksum", sa.String(length=144), nullable=True),
        sa.Column("request_key", sa.String(length=64), nullable=True),
        sa.Column("identifier", sa.String(length=27), nullable=True),
        sa.Column("verified_by", sa.String(length=144), nullable=True),
        sa.Column("facts", sa.JSON(), nullable=True),
        sa.Column("upload", sa.JSON(), nullable=True),
        sa.Column("received", sa.BigInteger(), nullable=False),
        sa.Column("source_digests", sa.JSON(), nullable=True),
        sa.Column("source_format", sa.String(length=16), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("file_size", sa.BigInteger(), nullable=True),
        sa.Column("allocated", sa.BigInteger(), nullable=True),
        sa.Column("charged", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name="fk_images_owner_id_users"),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
    )
    for column in IMAGE_LISTS:
        op.create_index(f"ix_images_{column}", "images", [column, "id"], unique=False)
    op.create_index(
        "uq_images_one_per_request",
        "images",
        ["request_key"],
        unique=True,
        sqlite_where=ONE_PER_REQUEST,
        postgresql_where=ONE_PER_REQUEST,
    )


def _askers() -> None:
    op.create_table(
        "image_askers",
        sa.Column("image_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["image_id"], ["images.id"], name="fk_image_askers_image_id_images", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_image_askers_user_id_users", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("image_id", "user_id", name="pk_image_askers"),
    )
    op.create_index("ix_image_askers_user", "image_askers", ["user_id", "image_id"], unique=False)


def _pins() -> None:
    op.create_table(
        "image_pins",
        sa.Column("image_id", sa.Uuid(), nullable=False),
        sa.Column("principal_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("kind", _one_of("overlay", "admin", "case"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_image_pins_image_id_images"),
        sa.ForeignKeyConstraint(["principal_id"], ["users.id"], name="fk_image_pins_principal_id_users"),
        sa.PrimaryKeyConstraint("image_id", "principal_id", "name", name="pk_image_pins"),
    )
    op.create_index("ix_image_pins_principal", "image_pins", ["principal_id"], unique=False)


def _golden_copies() -> None:
    op.create_table(
        "golden_copies",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state", _one_of("creating", "available", "deleting"), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name="fk_golden_copies_pool_pools"),
        sa.PrimaryKeyConstraint("id", name="pk_golden_copies"),
        sa.UniqueConstraint("digest", "pool", name="uq_golden_copies_digest_pool"),
    )
    op.create_index("ix_golden_copies_pool", "golden_copies", ["pool", "id"], unique=False)


#: What images were charged for is given back: without their tables nobody would.
GIVE_BACK = (
    "UPDATE pools SET promised = promised"
    " - coalesce((SELECT sum(size) FROM golden_copies WHERE golden_copies.pool = pools.name), 0)",
    "UPDATE users SET"
    " used_size = used_size - coalesce((SELECT sum(charged) FROM images WHERE images.owner_id = users.id), 0),"
    " used_count = used_count"
    " - (SELECT count(*) FROM images WHERE images.owner_id = users.id AND origin_kind <> 'reference')",
    "DELETE FROM operations WHERE lane = 'image' OR kind LIKE 'image.%' OR kind = 'volume.from-image'",
)


def downgrade() -> None:
    for statement in GIVE_BACK:
        op.execute(statement)
    for table in ("golden_copies", "image_pins", "image_askers", "images", "image_caches", "operation_watchers"):
        op.drop_table(table)
    op.drop_index("ix_volumes_origin", table_name="volumes")
    op.drop_column("operations", "result")
