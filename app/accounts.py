"""Users, nodes, tokens, groups and quotas."""

from __future__ import annotations

import datetime as dt
from uuid import UUID

from sqlalchemy import delete, exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, joinedload

from app import capacity
from app.auth import Caller
from app.config import Settings
from app.db import change
from app.errors import Problem, conflict, not_found
from app.events import Actor, record
from app.ids import new_id
from app.keys import hash_password, new_token, token_digest
from app.models import Attachment, Group, GroupMember, Image, ImagePin, Snapshot, Token, User, Volume
from app.paging import Page, page
from app.schemas import (
    GroupCreate,
    GroupUpdate,
    NodeCreate,
    NodeUpdate,
    Paging,
    QuotaUpdate,
    TokenCreate,
    UserCreate,
    UserUpdate,
)
from app.states import now

# ---------------------------------------------------------------- users and nodes


def principals(session: Session, caller: Caller, wanted: Paging, *, nodes: bool) -> Page[User]:
    caller.require_admin()
    role = User.role == "node" if nodes else User.role != "node"
    return page(session, User, limit=wanted.limit, cursor=wanted.next, branches=[[role]])


def find_user(session: Session, caller: Caller, name: str, *, node: bool | None = None) -> User:
    """Admins find everyone, others themselves."""
    user = session.scalar(select(User).where(User.name == name).execution_options(populate_existing=True))
    wrong_kind = user is not None and node is not None and (user.role == "node") != node
    if user is None or wrong_kind or not (caller.is_admin or user.id == caller.id):
        raise not_found("node" if node else "user", name)
    return user


def create_user(
    session: Session, actor: Actor, name: str, role: str, *, password: str | None = None, initiator: str | None = None
) -> User:
    """Record a principal of any role; conflict when the name (or a node's initiator) is taken."""
    user = User(
        id=new_id(),
        name=name,
        role=role,
        password_hash=hash_password(password) if password else None,
        enabled=True,
        initiator=initiator,
        used_size=0,
        used_count=0,
        created_at=now(),
    )
    session.add(user)
    try:
        session.flush()
    except IntegrityError:
        raise conflict("name-taken", f"The name {name!r} or the initiator belongs to somebody already.") from None
    record(session, actor, "user.create", ("user", user.id), name=name, role=role, initiator=initiator)
    return user


def add_user(session: Session, caller: Caller, body: UserCreate) -> User:
    caller.require_admin()
    return create_user(session, caller.actor, body.name, body.role, password=body.password)


def add_node(session: Session, caller: Caller, body: NodeCreate) -> User:
    caller.require_admin()
    return create_user(session, caller.actor, body.name, "node", initiator=body.initiator)


def change_user(session: Session, caller: Caller, name: str, body: UserUpdate) -> User:
    """Users change their own password; only admins enable and disable."""
    user = find_user(session, caller, name, node=False)
    if body.enabled is not None:
        caller.require_admin()
        _keep_one_admin(session, user, body.enabled)
        user.enabled = body.enabled
    if body.password is not None:
        user.password_hash = hash_password(body.password)
    record(session, caller.actor, "user.update", ("user", user.id), changed=sorted(body.model_fields_set))
    return user


def _keep_one_admin(session: Session, user: User, stays: bool) -> None:
    # Locked where the database can (one write at a time where it cannot), so that two do not each count on the other.
    admins = select(User.id).where(User.role == "admin", User.enabled).order_by(User.id).with_for_update()
    if user.role == "admin" and not stays and not set(session.scalars(admins)) - {user.id}:
        raise conflict("last-admin", "This is the last admin; make another one first.")


def change_node(session: Session, caller: Caller, name: str, body: NodeUpdate) -> User:
    caller.require_admin()
    node = find_user(session, caller, name, node=True)
    if body.initiator is not None:
        node.initiator = body.initiator
    if body.enabled is not None:
        node.enabled = body.enabled
    try:
        session.flush()
    except IntegrityError:
        raise conflict("name-taken", f"The initiator {body.initiator} belongs to another node.") from None
    record(session, caller.actor, "node.update", ("user", node.id), changed=sorted(body.model_fields_set))
    return node


def delete_user(session: Session, caller: Caller, name: str, *, node: bool) -> None:
    """Refused while volumes, snapshots or attachments name them: the record of who did what stays."""
    caller.require_admin()
    user = find_user(session, caller, name, node=node)
    _keep_one_admin(session, user, stays=False)
    used = (
        exists().where(Volume.owner_id == user.id),
        exists().where(Image.owner_id == user.id),
        exists().where(ImagePin.principal_id == user.id),
        exists().where(Snapshot.owner_id == user.id),
        exists().where(Attachment.principal_id == user.id),
    )
    if any(session.scalar(select(condition)) for condition in used):
        raise conflict(
            "user-in-use",
            f"{name} has volumes, snapshots, images or attachments; delete those, or disable the account.",
        )
    session.delete(user)
    record(session, caller.actor, "user.delete", ("user", user.id), name=name)


# ---------------------------------------------------------------- tokens


def tokens(session: Session, caller: Caller, wanted: Paging) -> Page[Token]:
    mine = [] if caller.is_admin else [Token.user_id == caller.id]
    options = [joinedload(Token.user)]
    return page(session, Token, limit=wanted.limit, cursor=wanted.next, branches=[mine], options=options)


def issue_token(
    session: Session, actor: Actor, user: User, description: str | None, lifetime: dt.timedelta | None = None
) -> tuple[Token, str]:
    """The record and the token itself, which is nowhere kept."""
    text, moment = new_token(), now()
    token = Token(
        id=new_id(),
        user_id=user.id,
        digest=token_digest(text),
        description=description,
        created_at=moment,
        expires_at=moment + lifetime if lifetime else None,
    )
    session.add(token)
    session.flush()
    session.refresh(token, ["user"])
    record(session, actor, "token.create", ("token", token.id), user=user.name)
    return token, text


def add_token(session: Session, caller: Caller, body: TokenCreate) -> tuple[Token, str]:
    user = find_user(session, caller, body.user or caller.name)
    lifetime = dt.timedelta(seconds=body.expires_in) if body.expires_in is not None else None
    return issue_token(session, caller.actor, user, body.description, lifetime)


def revoke_token(session: Session, caller: Caller, identifier: UUID) -> None:
    mine = () if caller.is_admin else (Token.user_id == caller.id,)
    revoked = update(Token).where(Token.id == identifier, *mine, Token.revoked_at.is_(None)).values(revoked_at=now())
    if change(session, revoked) == 0:
        raise not_found("token", identifier)
    record(session, caller.actor, "token.revoke", ("token", identifier))


# ---------------------------------------------------------------- groups


def groups(session: Session, caller: Caller, wanted: Paging) -> Page[Group]:
    joined = Group.id.in_(select(GroupMember.group_id).where(GroupMember.user_id == caller.id))
    branches = [[]] if caller.is_admin else [[joined]]
    return page(session, Group, limit=wanted.limit, cursor=wanted.next, branches=branches)


def find_group(session: Session, caller: Caller, name: str) -> Group:
    """Admins find every group, others those they belong to."""
    query = select(Group).where(Group.name == name)
    if not caller.is_admin:
        query = query.join(GroupMember).where(GroupMember.user_id == caller.id)
    group = session.scalar(query)
    if group is None:
        raise not_found("group", name)
    return group


def members(session: Session, group: Group) -> list[str]:
    query = select(User.name).join(GroupMember).where(GroupMember.group_id == group.id).order_by(User.name)
    return list(session.scalars(query))


def add_group(session: Session, caller: Caller, body: GroupCreate) -> Group:
    caller.require_admin()
    group = Group(id=new_id(), name=body.name, created_at=now())
    session.add(group)
    try:
        session.flush()
    except IntegrityError:
        raise conflict("name-taken", f"There is a group {body.name!r} already.") from None
    record(session, caller.actor, "group.create", ("group", group.id), name=body.name)
    return group


def set_members(session: Session, caller: Caller, name: str, body: GroupUpdate) -> Group:
    caller.require_admin()
    group = find_group(session, caller, name)
    wanted = set(body.members)
    users = session.scalars(select(User).where(User.name.in_(wanted))).all()
    unknown = sorted(wanted - {user.name for user in users})
    if unknown:
        raise Problem(404, "user-not-found", f"There is no user {', '.join(unknown)}.")
    change(session, delete(GroupMember).where(GroupMember.group_id == group.id))
    session.add_all(GroupMember(group_id=group.id, user_id=user.id) for user in users)
    session.flush()
    record(session, caller.actor, "group.update", ("group", group.id), members=sorted(wanted))
    return group


def delete_group(session: Session, caller: Caller, name: str) -> None:
    """Its shares go with it."""
    caller.require_admin()
    group = find_group(session, caller, name)
    session.delete(group)
    record(session, caller.actor, "group.delete", ("group", group.id), name=name)


# ---------------------------------------------------------------- quotas


def quota(session: Session, settings: Settings, caller: Caller, name: str) -> dict[str, object]:
    user = find_user(session, caller, name)
    size, count = capacity.limits(settings, user)
    return {"user": name, "size": size, "count": count, "used_size": user.used_size, "used_count": user.used_count}


def set_quota(session: Session, settings: Settings, caller: Caller, name: str, body: QuotaUpdate) -> dict[str, object]:
    caller.require_admin()
    user = find_user(session, caller, name)
    user.quota_size, user.quota_count = body.size, body.count
    session.flush()
    record(session, caller.actor, "quota.update", ("user", user.id), size=body.size, count=body.count)
    return quota(session, settings, caller, name)


def bootstrap(session: Session) -> str | None:
    """The first admin and their token, when there is no user yet; None otherwise."""
    if session.scalar(select(exists().where(User.id.is_not(None)))):
        return None
    actor = Actor("system")
    admin = create_user(session, actor, "admin", "admin")
    return issue_token(session, actor, admin, "made at the first start")[1]
