"""Who is calling, and what they may see and do."""

from __future__ import annotations

import base64
import datetime as dt
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, bindparam, exists, or_, select
from sqlalchemy.orm import Session

from app.errors import Problem, forbidden
from app.events import Actor
from app.keys import password_matches, token_digest
from app.models import GroupMember, Image, Share, Snapshot, Token, User, Volume

CHALLENGES = 'Bearer realm="stratus", Basic realm="stratus", charset="UTF-8"'


@dataclass(frozen=True)
class Caller:
    """A signed-in principal and the address it calls from."""

    id: UUID
    name: str
    role: str
    address: str | None = None
    initiator: str | None = None

    @property
    def actor(self) -> Actor:
        return Actor(self.name, self.address)

    @property
    def is_admin(self) -> bool:
        return self.role == "admin"

    @property
    def sees_all(self) -> bool:
        """Admins, and nodes: a hypervisor attaches the volumes of any owner."""
        return self.role in ("admin", "node")

    def require_admin(self) -> None:
        if not self.is_admin:
            raise forbidden("admin-only", "Only an admin may do this.")


def _unauthorized(code: str, detail: str) -> Problem:
    return Problem(401, code, detail, headers={"WWW-Authenticate": CHALLENGES})


def sign_in(session: Session, authorization: str | None, address: str | None) -> Caller:
    """The caller behind an Authorization header (RFC 6750 bearer token, RFC 7617 basic); Problem 401 otherwise."""
    scheme, _, credentials = (authorization or "").partition(" ")
    if not authorization:
        raise _unauthorized("not-signed-in", "Send an API token: Authorization: Bearer TOKEN.")
    if scheme.lower() == "bearer":
        user = _by_token(session, credentials.strip())
    elif scheme.lower() == "basic":
        user = _by_password(session, credentials.strip())
    else:
        raise _unauthorized("not-signed-in", "The Authorization header must be Bearer or Basic.")
    if not user.enabled:
        raise _unauthorized("account-disabled", "This account is disabled; ask an admin.")
    return Caller(user.id, user.name, user.role, address, user.initiator)


# Columns and not records, put together once: every request asks for them.
_WHO = (User.id, User.name, User.role, User.enabled, User.initiator)
_BY_DIGEST = (
    select(*_WHO, Token.expires_at, Token.revoked_at)
    .join(Token, Token.user_id == User.id)
    .where(Token.digest == bindparam("digest"))
)


def _by_token(session: Session, text: str) -> Any:
    found = session.execute(_BY_DIGEST, {"digest": token_digest(text)}).first()
    if found is None:
        raise _unauthorized("token-invalid", "This API token is not known here.")
    if found.revoked_at is not None:
        raise _unauthorized("token-revoked", "This API token was revoked; create another.")
    if found.expires_at is not None and found.expires_at <= dt.datetime.now(dt.UTC):
        raise _unauthorized("token-expired", "This API token has expired; create another.")
    return found


def _by_password(session: Session, credentials: str) -> User:
    try:
        name, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        raise _unauthorized("not-signed-in", "The Basic credentials are not base64 of name:password.") from None
    # PostgreSQL takes no NUL in a text, and no name has one.
    user = session.scalar(select(User).where(User.name == name)) if name.isprintable() else None
    if not password_matches(user.password_hash if user else None, password) or user is None:
        raise _unauthorized("password-invalid", "The name or the password is wrong.")
    return user


def groups_of(caller: Caller) -> ColumnElement[bool]:
    """Shares with any group of the caller."""
    return Share.group_id.in_(select(GroupMember.group_id).where(GroupMember.user_id == caller.id))


def may_see(caller: Caller) -> ColumnElement[bool]:
    """The condition on a single volume; lists go through indexed branches instead (`volumes.page`)."""
    if caller.sees_all:
        return Volume.id.is_not(None)
    shared = exists().where(Share.volume_id == Volume.id, groups_of(caller))
    return or_(Volume.owner_id == caller.id, Volume.visibility == "public", shared)


def may_write(session: Session, caller: Caller, volume: Volume) -> bool:
    """Owner, admin and node may; a member of a group it is shared with in mode rw may too."""
    if caller.sees_all or volume.owner_id == caller.id:
        return True
    return bool(
        session.scalar(select(exists().where(Share.volume_id == volume.id, Share.mode == "rw", groups_of(caller))))
    )


def require_owner(caller: Caller, record: Volume | Snapshot | Image) -> None:
    if not caller.is_admin and record.owner_id != caller.id:
        raise forbidden("not-owner", "Only the owner or an admin may do this.")
