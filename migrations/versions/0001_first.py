"""The tables of volumes, snapshots, attachments, operations, events, accounts and pools."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

VOLUME_LISTS = (
    ("owner_id",),
    ("owner_id", "state"),
    ("owner_id", "name"),
    ("visibility",),
    ("visibility", "state"),
    ("visibility", "name"),
    ("state",),
    ("name",),
)


def upgrade() -> None:
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=True),
        sa.Column("resource_kind", sa.String(length=32), nullable=True),
        sa.Column("resource_id", sa.Uuid(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=True),
        sa.Column("previous", sa.String(length=64), nullable=True),
        sa.Column("hash", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("sequence", name=op.f("uq_events_sequence")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index("ix_events_kind", ["kind", "id"], unique=False)
        batch_op.create_index("ix_events_resource", ["resource_id", "id"], unique=False)
        batch_op.create_index(
            "ix_events_unsealed",
            ["id"],
            unique=False,
            sqlite_where=sa.text("sequence IS NULL"),
            postgresql_where=sa.text("sequence IS NULL"),
        )

    op.create_table(
        "groups",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_groups")),
        sa.UniqueConstraint("name", name=op.f("uq_groups_name")),
    )
    op.create_table(
        "pools",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("pool_id", sa.Uuid(), nullable=True),
        sa.Column("driver", sa.String(length=32), nullable=False),
        sa.Column("state", sa.Enum("active", "unusable", native_enum=False, length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("live_clone", sa.Boolean(), nullable=False),
        sa.Column("granularity", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("free", sa.BigInteger(), nullable=False),
        sa.Column("allocated", sa.BigInteger(), nullable=False),
        sa.Column("promised", sa.BigInteger(), nullable=False),
        sa.Column("overcommit_ratio", sa.Double(), nullable=False),
        sa.Column("low_space", sa.BigInteger(), nullable=False),
        sa.Column("alarm", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_pools")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("role", sa.Enum("user", "node", "admin", native_enum=False, length=32), nullable=False),
        sa.Column("password_hash", sa.String(length=256), nullable=True),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("initiator", sa.String(length=223), nullable=True),
        sa.Column("quota_size", sa.BigInteger(), nullable=True),
        sa.Column("quota_count", sa.BigInteger(), nullable=True),
        sa.Column("used_size", sa.BigInteger(), nullable=False),
        sa.Column("used_count", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("initiator", name=op.f("uq_users_initiator")),
        sa.UniqueConstraint("name", name=op.f("uq_users_name")),
    )
    op.create_table(
        "workers",
        sa.Column("host", sa.String(length=64), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("beat_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("host", name=op.f("pk_workers")),
    )
    op.create_table(
        "group_members",
        sa.Column("group_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["group_id"], ["groups.id"], name=op.f("fk_group_members_group_id_groups"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_group_members_user_id_users"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("group_id", "user_id", name=op.f("pk_group_members")),
    )
    with op.batch_alter_table("group_members", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_group_members_user_id"), ["user_id"], unique=False)

    op.create_table(
        "idempotency_keys",
        sa.Column("principal_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("operation_id", sa.Uuid(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["principal_id"], ["users.id"], name=op.f("fk_idempotency_keys_principal_id_users"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("principal_id", "key", name=op.f("pk_idempotency_keys")),
    )
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_idempotency_keys_created_at"), ["created_at"], unique=False)

    op.create_table(
        "operations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("lane", sa.Enum("data", "export", native_enum=False, length=32), nullable=False),
        sa.Column(
            "state",
            sa.Enum("queued", "running", "succeeded", "failed", "cancelled", native_enum=False, length=32),
            nullable=False,
        ),
        sa.Column("subject_id", sa.Uuid(), nullable=False),
        sa.Column("resource_kind", sa.String(length=32), nullable=False),
        sa.Column("resource_id", sa.Uuid(), nullable=False),
        sa.Column("principal_id", sa.Uuid(), nullable=True),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=True),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("progress", sa.Integer(), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("error_detail", sa.Text(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.String(length=64), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["principal_id"], ["users.id"], name=op.f("fk_operations_principal_id_users"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operations")),
    )
    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.create_index(
            "ix_operations_open",
            ["lane", "id"],
            unique=False,
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )
        batch_op.create_index(
            "ix_operations_open_subject",
            ["subject_id", "lane", "id"],
            unique=False,
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )
        batch_op.create_index("ix_operations_principal", ["principal_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_operations_resource_id"), ["resource_id"], unique=False)
        batch_op.create_index(
            "uq_operations_one_running",
            ["subject_id", "lane"],
            unique=True,
            sqlite_where=sa.text("state = 'running'"),
            postgresql_where=sa.text("state = 'running'"),
        )

    op.create_table(
        "snapshots",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=True),
        sa.Column("volume_id", sa.Uuid(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column(
            "state", sa.Enum("creating", "available", "deleting", "error", native_enum=False, length=32), nullable=False
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("readers", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("readers >= 0", name=op.f("ck_snapshots_readers")),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_snapshots_owner_id_users")),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name=op.f("fk_snapshots_pool_pools")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshots")),
    )
    with op.batch_alter_table("snapshots", schema=None) as batch_op:
        batch_op.create_index("ix_snapshots_name", ["name", "id"], unique=False)
        batch_op.create_index("ix_snapshots_owner", ["owner_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_snapshots_volume_id"), ["volume_id"], unique=False)

    op.create_table(
        "tokens",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("description", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_tokens_user_id_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
    )
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tokens_user_id"), ["user_id"], unique=False)

    op.create_table(
        "volumes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("new_size", sa.BigInteger(), nullable=True),
        sa.Column(
            "state",
            sa.Enum("creating", "available", "in-use", "reverting", "deleting", "error", native_enum=False, length=32),
            nullable=False,
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("visibility", sa.Enum("private", "public", native_enum=False, length=32), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("origin_kind", sa.String(length=16), nullable=True),
        sa.Column("origin_id", sa.Uuid(), nullable=True),
        sa.Column("held_mode", sa.Enum("rw", "ro", native_enum=False, length=32), nullable=True),
        sa.Column("readers", sa.Integer(), nullable=False),
        sa.Column("tid", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("readers >= 0", name=op.f("ck_volumes_readers")),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_volumes_owner_id_users")),
        sa.ForeignKeyConstraint(["pool"], ["pools.name"], name=op.f("fk_volumes_pool_pools")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_volumes")),
        sa.UniqueConstraint("id", "held_mode", name=op.f("uq_volumes_id_held_mode")),
        sa.UniqueConstraint("tid", name=op.f("uq_volumes_tid")),
    )
    with op.batch_alter_table("volumes", schema=None) as batch_op:
        for columns in VOLUME_LISTS:
            batch_op.create_index(f"ix_volumes_{'_'.join(columns)}", [*columns, "id"], unique=False)

    op.create_table(
        "attachments",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("volume_id", sa.Uuid(), nullable=False),
        sa.Column("principal_id", sa.Uuid(), nullable=False),
        sa.Column("instance_id", sa.String(length=128), nullable=False),
        sa.Column("node", sa.String(length=128), nullable=False),
        sa.Column("initiator", sa.String(length=223), nullable=False),
        sa.Column("mode", sa.Enum("rw", "ro", native_enum=False, length=32), nullable=False),
        sa.Column("held_mode", sa.Enum("rw", "ro", native_enum=False, length=32), nullable=True),
        sa.Column("direct", sa.Boolean(), nullable=False),
        sa.Column(
            "state",
            sa.Enum("attaching", "attached", "detaching", "detached", "error", native_enum=False, length=32),
            nullable=False,
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attached_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("detached_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(held_mode IS NULL) = (state = 'detached')", name=op.f("ck_attachments_held_until_detached")
        ),
        sa.CheckConstraint("held_mode IS NULL OR held_mode = mode", name=op.f("ck_attachments_held")),
        sa.ForeignKeyConstraint(["principal_id"], ["users.id"], name=op.f("fk_attachments_principal_id_users")),
        sa.ForeignKeyConstraint(
            ["volume_id", "held_mode"],
            ["volumes.id", "volumes.held_mode"],
            name=op.f("fk_attachments_volume_id_held_mode_volumes"),
        ),
        sa.ForeignKeyConstraint(
            ["volume_id"], ["volumes.id"], name=op.f("fk_attachments_volume_id_volumes"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attachments")),
    )
    with op.batch_alter_table("attachments", schema=None) as batch_op:
        batch_op.create_index("ix_attachments_node", ["node", "id"], unique=False)
        batch_op.create_index("ix_attachments_principal", ["principal_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_attachments_volume_id"), ["volume_id"], unique=False)
        batch_op.create_index(
            "uq_attachments_one_per_initiator",
            ["volume_id", "initiator"],
            unique=True,
            sqlite_where=sa.text("held_mode IS NOT NULL"),
            postgresql_where=sa.text("held_mode IS NOT NULL"),
        )
        batch_op.create_index(
            "uq_attachments_one_writer",
            ["volume_id"],
            unique=True,
            sqlite_where=sa.text("held_mode = 'rw'"),
            postgresql_where=sa.text("held_mode = 'rw'"),
        )

    op.create_table(
        "shares",
        sa.Column("volume_id", sa.Uuid(), nullable=False),
        sa.Column("group_id", sa.Uuid(), nullable=False),
        sa.Column("mode", sa.Enum("rw", "ro", native_enum=False, length=32), nullable=False),
        sa.ForeignKeyConstraint(
            ["group_id"], ["groups.id"], name=op.f("fk_shares_group_id_groups"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["volume_id"], ["volumes.id"], name=op.f("fk_shares_volume_id_volumes"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("volume_id", "group_id", name=op.f("pk_shares")),
    )
    with op.batch_alter_table("shares", schema=None) as batch_op:
        batch_op.create_index("ix_shares_group", ["group_id", "volume_id"], unique=False)

    op.create_table(
        "connections",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("attachment_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.Enum("primary", "migration-target", native_enum=False, length=32), nullable=False),
        sa.Column("initiator", sa.String(length=223), nullable=False),
        sa.Column("networks", sa.JSON(), nullable=False),
        sa.Column("portal", sa.String(length=128), nullable=False),
        sa.Column("username", sa.String(length=64), nullable=False),
        sa.Column("mutual", sa.Boolean(), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["attachment_id"],
            ["attachments.id"],
            name=op.f("fk_connections_attachment_id_attachments"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_connections")),
        sa.UniqueConstraint("attachment_id", "role", name=op.f("uq_connections_attachment_id_role")),
        sa.UniqueConstraint("username", name=op.f("uq_connections_username")),
    )

    # Numbers that are never given twice begin at 1.
    op.execute("INSERT INTO counters (name, value) VALUES ('tid', 0)")


def downgrade() -> None:
    op.drop_table("connections")
    with op.batch_alter_table("shares", schema=None) as batch_op:
        batch_op.drop_index("ix_shares_group")

    op.drop_table("shares")
    with op.batch_alter_table("attachments", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_attachments_one_writer",
            sqlite_where=sa.text("held_mode = 'rw'"),
            postgresql_where=sa.text("held_mode = 'rw'"),
        )
        batch_op.drop_index(
            "uq_attachments_one_per_initiator",
            sqlite_where=sa.text("held_mode IS NOT NULL"),
            postgresql_where=sa.text("held_mode IS NOT NULL"),
        )
        batch_op.drop_index(batch_op.f("ix_attachments_volume_id"))
        batch_op.drop_index("ix_attachments_principal")
        batch_op.drop_index("ix_attachments_node")

    op.drop_table("attachments")
    with op.batch_alter_table("volumes", schema=None) as batch_op:
        for columns in VOLUME_LISTS:
            batch_op.drop_index(f"ix_volumes_{'_'.join(columns)}")

    op.drop_table("volumes")
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tokens_user_id"))

    op.drop_table("tokens")
    with op.batch_alter_table("snapshots", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_snapshots_volume_id"))
        batch_op.drop_index("ix_snapshots_owner")
        batch_op.drop_index("ix_snapshots_name")

    op.drop_table("snapshots")
    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_operations_one_running",
            sqlite_where=sa.text("state = 'running'"),
            postgresql_where=sa.text("state = 'running'"),
        )
        batch_op.drop_index(batch_op.f("ix_operations_resource_id"))
        batch_op.drop_index("ix_operations_principal")
        batch_op.drop_index(
            "ix_operations_open",
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )

    op.drop_table("operations")
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_idempotency_keys_created_at"))

    op.drop_table("idempotency_keys")
    with op.batch_alter_table("group_members", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_group_members_user_id"))

    op.drop_table("group_members")
    op.drop_table("workers")
    op.drop_table("users")
    op.drop_table("pools")
    op.drop_table("groups")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_events_unsealed", sqlite_where=sa.text("sequence IS NULL"), postgresql_where=sa.text("sequence IS NULL")
        )
        batch_op.drop_index("ix_events_resource")
        batch_op.drop_index("ix_events_kind")

    op.drop_table("events")
    op.drop_table("counters")
