"""Rows written straight into the tables, for tests of what the schema itself allows."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from app.ids import new_id
from app.models import (
    Attachment,
    Connection,
    Counter,
    Event,
    GoldenCopy,
    Group,
    GroupMember,
    IdempotencyKey,
    Image,
    ImageAsker,
    ImageCache,
    ImagePin,
    Operation,
    OperationWatcher,
    Pool,
    Share,
    Snapshot,
    Token,
    User,
    Volume,
    WorkerBeat,
)
from app.states import now

MIB = 1 << 20


def user(name: str = "alice", role: str = "user", **values: Any) -> User:
    defaults = {"enabled": True, "used_size": 0, "used_count": 0, "created_at": now()}
    return User(**{"id": new_id(), "name": name, "role": role, **defaults, **values})


def pool(name: str = "default", **values: Any) -> Pool:
    defaults = {"driver": "directory", "state": "active", "live_clone": False, "size": 1 << 40, "free": 1 << 40}
    defaults["granularity"] = 1
    counted = {"allocated": 0, "promised": 0, "overcommit_ratio": 4.0, "low_space": 0}
    return Pool(**{"name": name, **defaults, **counted, **values})


def volume(owner: UUID, tid: int, **values: Any) -> Volume:
    defaults = {"size": 64 * MIB, "state": "available", "visibility": "private", "pool": "default", "readers": 0}
    stamps = {"version": 1, "created_at": now(), "updated_at": now()}
    return Volume(**{"id": new_id(), "owner_id": owner, "tid": tid, **defaults, **stamps, **values})


def snapshot(owner: UUID, volume_id: UUID, **values: Any) -> Snapshot:
    defaults = {"size": 64 * MIB, "state": "available", "pool": "default", "readers": 0}
    stamps = {"version": 1, "created_at": now(), "updated_at": now()}
    return Snapshot(**{"id": new_id(), "owner_id": owner, "volume_id": volume_id, **defaults, **stamps, **values})


def attachment(principal: UUID, volume_id: UUID, mode: str = "rw", **values: Any) -> Attachment:
    identifier = new_id()
    defaults = {"instance_id": "i-1", "node": "n-1", "initiator": f"iqn.2026-11.org.example:{identifier.hex}"}
    states = {"mode": mode, "held_mode": mode, "direct": True, "state": "attached", "created_at": now()}
    ids = {"id": identifier, "volume_id": volume_id, "principal_id": principal}
    return Attachment(**{**ids, **defaults, **states, **values})


def operation(subject: UUID, **values: Any) -> Operation:
    defaults = {"kind": "volume.create", "lane": "data", "state": "queued", "resource_kind": "volume"}
    counted = {"parameters": {}, "progress": 0, "cancel_requested": False, "attempt": 0, "fence": 0}
    stamps = {"not_before": now(), "created_at": now()}
    ids = {"id": new_id(), "subject_id": subject, "resource_id": subject}
    return Operation(**{**ids, **defaults, **counted, **stamps, **values})


def image(owner: UUID, **values: Any) -> Image:
    defaults = {"state": "available", "visibility": "private", "origin_kind": "reference", "received": 0, "charged": 0}
    stamps = {"version": 1, "used_at": now(), "created_at": now(), "updated_at": now()}
    return Image(**{"id": new_id(), "owner_id": owner, **defaults, **stamps, **values})


def golden_copy(digest: str, pool: str = "default", **values: Any) -> GoldenCopy:
    defaults = {"size": 64 * MIB, "state": "available", "used_at": now(), "created_at": now()}
    return GoldenCopy(**{"id": new_id(), "digest": digest, "pool": pool, **defaults, **values})


def one_of_each(session: Session, suffix: str = "") -> None:
    """A row in every table, that hang together."""
    alice = user(f"alice{suffix}", used_size=129 * MIB, used_count=3)
    group = Group(id=new_id(), name=f"friends{suffix}", created_at=now())
    tid = session.get_one(Counter, "tid")
    tid.value += 1
    home = pool(f"default{suffix}", promised=192 * MIB)
    session.add_all([alice, group, home])
    session.flush()
    data = volume(alice.id, tid.value, pool=home.name, held_mode="rw", state="in-use")
    session.add(data)
    session.flush()
    held = attachment(alice.id, data.id)
    session.add_all(
        [held, snapshot(alice.id, data.id, pool=home.name), GroupMember(group_id=group.id, user_id=alice.id)]
    )
    session.flush()
    session.add(Share(volume_id=data.id, group_id=group.id, mode="ro"))
    work = operation(data.id, principal_id=alice.id)
    session.add(work)
    _images(session, alice, work, home.name)
    session.add(Token(id=new_id(), user_id=alice.id, digest=new_id().hex * 2, created_at=now()))
    session.add(Event(id=new_id(), at=now(), kind="volume.create", actor="alice", detail={"size": 1}))
    session.add(IdempotencyKey(principal_id=alice.id, key="key-00000001", fingerprint="0" * 64, created_at=now()))
    session.add(WorkerBeat(host=f"host{suffix}", pid=1, ready=True, beat_at=now()))
    session.add(
        Connection(id=new_id(), attachment_id=held.id, role="primary", initiator=held.initiator, networks=[],
                   portal="127.0.0.1:3260", username=f"a{held.id.hex}", mutual=False, key_id="k", secret=b"s",
                   created_at=now())
    )  # fmt: skip
    session.flush()


def _images(session: Session, alice: User, work: Operation, home: str) -> None:
    session.flush()
    fetched, sent = image(alice.id, digest="d" * 64), image(alice.id, origin_kind="upload", charged=MIB)
    session.add_all([fetched, sent, golden_copy("d" * 64, home)])
    session.add(OperationWatcher(operation_id=work.id, user_id=alice.id, waiting=True))
    session.merge(ImageCache(name="images", state="active", size=0, free=0, allocated=0))
    session.flush()
    session.add(ImageAsker(image_id=fetched.id, user_id=alice.id))
    session.add(ImagePin(image_id=fetched.id, principal_id=alice.id, name="i-1", kind="overlay", created_at=now()))
