"""Who may sign in, what they hold, and what stays when they go."""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import accounts, capacity
from app.auth import Caller, sign_in
from app.config import Settings, load
from app.db import Database
from app.errors import Problem
from app.events import SYSTEM
from app.models import Event, Pool, Token, User
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
from tests.support import rows
from tests.support.rows import MIB

PASSWORD = "correct horse battery"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(tmp_path, environ={}, flags={"quota": {"size": "10MiB", "count": 3}})


@pytest.fixture
def root(database: Database) -> Caller:
    return add(database, "root", "admin")


def add(database: Database, name: str, role: str = "user", password: str | None = None) -> Caller:
    with database.write() as session:
        user = accounts.create_user(session, SYSTEM, name, role, password=password)
    return Caller(user.id, name, role)


def refused(database: Database, code: str, action: Callable[[Session], Any]) -> Problem:
    with pytest.raises(Problem) as found, database.write() as session:
        action(session)
    assert found.value.code == code
    return found.value


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


# ---------------------------------------------------------------- sign-in


def test_a_password_and_a_token_sign_the_same_person_in(database: Database) -> None:
    alice = add(database, "alice", password=PASSWORD)
    with database.write() as session:
        token = accounts.issue_token(session, SYSTEM, session.get_one(User, alice.id), "laptop")[1]
    with database.read() as session:
        for header in (basic("alice", PASSWORD), f"Bearer {token}", f"bearer  {token} "):
            caller = sign_in(session, header, "10.0.0.9")
            assert (caller.id, caller.name, caller.role, caller.address) == (alice.id, "alice", "user", "10.0.0.9")


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "not-signed-in"),
        ("", "not-signed-in"),
        ("Digest x", "not-signed-in"),
        ("Bearer", "token-invalid"),
        ("Bearer stratus_nothing", "token-invalid"),
        ("Bearer \x00", "token-invalid"),
        ("Basic", "password-invalid"),
        ("Basic ????", "not-signed-in"),
        ("Basic " + base64.b64encode(b"\xff\xfe:x").decode(), "not-signed-in"),
        (basic("alice", "wrong"), "password-invalid"),
        (basic("alice", ""), "password-invalid"),
        (basic("nobody", PASSWORD), "password-invalid"),
        (basic("al\x00ice", PASSWORD), "password-invalid"),
        (basic("", ""), "password-invalid"),
        (basic("tokens-only", ""), "password-invalid"),
    ],
)
def test_who_is_not_known_is_told_how_to_sign_in(database: Database, header: str | None, code: str) -> None:
    add(database, "alice", password=PASSWORD)
    add(database, "tokens-only")
    problem = refused(database, code, lambda session: sign_in(session, header, None))
    assert problem.status == 401
    assert "Bearer" in problem.headers["WWW-Authenticate"]


def test_a_token_ends_when_it_expires_or_is_revoked_or_its_user_is_disabled(database: Database, root: Caller) -> None:
    alice = add(database, "alice")
    with database.write() as session:
        user = session.get_one(User, alice.id)
        kept, text = accounts.issue_token(session, SYSTEM, user, None, dt.timedelta(hours=1))
        _, spent = accounts.issue_token(session, SYSTEM, user, None, dt.timedelta(seconds=-1))
    refused(database, "token-expired", lambda s: sign_in(s, f"Bearer {spent}", None))
    with database.write() as session:
        assert sign_in(session, f"Bearer {text}", None).id == alice.id
        accounts.change_user(session, root, "alice", UserUpdate(enabled=False))
    refused(database, "account-disabled", lambda s: sign_in(s, f"Bearer {text}", None))
    with database.write() as session:
        accounts.change_user(session, root, "alice", UserUpdate(enabled=True))
        accounts.revoke_token(session, alice, kept.id)
    refused(database, "token-revoked", lambda s: sign_in(s, f"Bearer {text}", None))
    refused(database, "token-not-found", lambda s: accounts.revoke_token(s, alice, kept.id))


def test_tokens_are_kept_as_digests_and_revoked_by_their_owner_or_an_admin(database: Database, root: Caller) -> None:
    alice, bob = add(database, "alice"), add(database, "bob")
    with database.write() as session:
        token, text = accounts.add_token(session, alice, TokenCreate(description="d", expires_in=3600))
        assert token.expires_at is not None
        assert dt.timedelta(minutes=59) < token.expires_at - now() <= dt.timedelta(hours=1)
    with database.read() as session:
        stored = session.scalars(select(Token)).one()
        events = session.scalars(select(Event)).all()
    assert text not in f"{vars(stored)} {[vars(event) for event in events]}"
    refused(database, "token-not-found", lambda s: accounts.revoke_token(s, bob, token.id))
    refused(database, "user-not-found", lambda s: accounts.add_token(s, bob, TokenCreate(user="alice")))
    with database.write() as session:
        assert [t.id for t in accounts.tokens(session, alice, Paging()).items] == [token.id]
        assert accounts.tokens(session, bob, Paging()).items == []
        accounts.revoke_token(session, root, token.id)


# ---------------------------------------------------------------- users, nodes, groups


def test_names_and_initiators_are_given_once(database: Database, root: Caller) -> None:
    node = NodeCreate(name="n1", initiator="iqn.2026-11.org.example:N1")
    with database.write() as session:
        accounts.add_user(session, root, UserCreate(name="alice"))
        assert accounts.add_node(session, root, node).initiator == "iqn.2026-11.org.example:n1"
    refused(database, "name-taken", lambda s: accounts.add_user(s, root, UserCreate(name="alice")))
    refused(database, "name-taken", lambda s: accounts.add_node(s, root, node.model_copy(update={"name": "n2"})))
    with database.write() as session:
        accounts.add_node(session, root, NodeCreate(name="n2", initiator="iqn.2026-11.org.example:n2"))
    taken = NodeUpdate(initiator="iqn.2026-11.org.example:n1")
    refused(database, "name-taken", lambda s: accounts.change_node(s, root, "n2", taken))
    with database.write() as session:
        changed = accounts.change_node(
            session, root, "n2", NodeUpdate(initiator="iqn.2026-11.org.example:n3", enabled=False)
        )
        assert (changed.initiator, changed.enabled) == ("iqn.2026-11.org.example:n3", False)
        assert [n.name for n in accounts.principals(session, root, Paging(), nodes=True).items] == ["n1", "n2"]
        assert [u.name for u in accounts.principals(session, root, Paging(), nodes=False).items] == ["root", "alice"]


@pytest.mark.parametrize(
    "initiator", ["iqn.nonsense", "iqn.2026-13.org.example:x", "naa.123", "host", "iqn.2026-11.org.ü"]
)
def test_a_bad_initiator_names_the_field(initiator: str) -> None:
    with pytest.raises(ValidationError) as found:
        NodeCreate(name="n", initiator=initiator)
    assert [error["loc"] for error in found.value.errors()] == [("initiator",)]


def test_users_change_their_password_and_nothing_else(database: Database) -> None:
    alice = add(database, "alice", password=PASSWORD)
    with database.write() as session:
        accounts.change_user(session, alice, "alice", UserUpdate(password="another long one"))
    with database.read() as session:
        assert sign_in(session, basic("alice", "another long one"), None).id == alice.id
    refused(database, "password-invalid", lambda s: sign_in(s, basic("alice", PASSWORD), None))
    refused(database, "admin-only", lambda s: accounts.change_user(s, alice, "alice", UserUpdate(enabled=True)))
    for action in (
        lambda s: accounts.add_user(s, alice, UserCreate(name="x")),
        lambda s: accounts.add_node(s, alice, NodeCreate(name="x", initiator="iqn.2026-11.org.example:x")),
        lambda s: accounts.add_group(s, alice, GroupCreate(name="x")),
        lambda s: accounts.principals(s, alice, Paging(), nodes=False),
        lambda s: accounts.delete_user(s, alice, "alice", node=False),
    ):
        refused(database, "admin-only", action)


def test_the_last_admin_stays(database: Database, root: Caller) -> None:
    refused(database, "last-admin", lambda s: accounts.change_user(s, root, "root", UserUpdate(enabled=False)))
    refused(database, "last-admin", lambda s: accounts.delete_user(s, root, "root", node=False))
    add(database, "second", "admin")
    with database.write() as session:
        accounts.change_user(session, root, "root", UserUpdate(enabled=False))
    refused(database, "last-admin", lambda s: accounts.delete_user(s, root, "second", node=False))


def test_who_is_named_by_records_is_not_deleted(database: Database, root: Caller) -> None:
    alice, _ = add(database, "alice"), add(database, "bob")
    with database.write() as session:
        session.add(rows.pool())
        session.flush()
        session.add(rows.volume(alice.id, 77))
    refused(database, "user-in-use", lambda s: accounts.delete_user(s, root, "alice", node=False))
    refused(database, "node-not-found", lambda s: accounts.delete_user(s, root, "bob", node=True))
    with database.write() as session:
        accounts.delete_user(session, root, "bob", node=False)
    refused(database, "user-not-found", lambda s: accounts.find_user(s, root, "bob"))


def test_groups_have_exactly_the_members_they_were_given(database: Database, root: Caller) -> None:
    alice, bob = add(database, "alice"), add(database, "bob")
    with database.write() as session:
        accounts.add_group(session, root, GroupCreate(name="friends"))
        accounts.set_members(session, root, "friends", GroupUpdate(members=["alice", "bob"]))
    refused(database, "name-taken", lambda s: accounts.add_group(s, root, GroupCreate(name="friends")))
    with database.write() as session:
        accounts.set_members(session, root, "friends", GroupUpdate(members=["bob"]))
    with database.read() as session:
        assert accounts.members(session, accounts.find_group(session, bob, "friends")) == ["bob"]
        assert [g.name for g in accounts.groups(session, bob, Paging()).items] == ["friends"]
        assert accounts.groups(session, alice, Paging()).items == []
    refused(database, "group-not-found", lambda s: accounts.find_group(s, alice, "friends"))
    unknown = refused(
        database,
        "user-not-found",
        lambda s: accounts.set_members(s, root, "friends", GroupUpdate(members=["eve", "bob"])),
    )
    assert "eve" in unknown.detail
    with database.write() as session:
        accounts.delete_group(session, root, "friends")
    refused(database, "group-not-found", lambda s: accounts.find_group(s, root, "friends"))


def test_the_first_start_makes_an_admin_and_no_later_one_does(database: Database) -> None:
    with database.write() as session:
        token = accounts.bootstrap(session)
    with database.write() as session:
        assert sign_in(session, f"Bearer {token}", None).is_admin
        assert accounts.bootstrap(session) is None


# ---------------------------------------------------------------- quotas and pools


def test_a_quota_is_the_sites_until_a_user_has_their_own(database: Database, settings: Settings, root: Caller) -> None:
    alice = add(database, "alice")
    with database.write() as session:
        shown = accounts.quota(session, settings, alice, "alice")
        assert (shown["size"], shown["count"]) == (10 * MIB, 3)
        accounts.set_quota(session, settings, root, "alice", QuotaUpdate(size=5 * MIB, count=None))
        assert accounts.quota(session, settings, alice, "alice")["size"] == 5 * MIB
        assert accounts.quota(session, settings, alice, "alice")["count"] == 3
    refused(
        database,
        "admin-only",
        lambda s: accounts.set_quota(s, settings, alice, "alice", QuotaUpdate(size=MIB, count=1)),
    )


@pytest.mark.parametrize(
    ("size", "count", "code"),
    [(10 * MIB, 1, None), (10 * MIB + 1, 1, "quota-exceeded"), (MIB, 4, "quota-exceeded"), (0, 3, None)],
)
def test_what_fits_exactly_fits(
    database: Database, settings: Settings, size: int, count: int, code: str | None
) -> None:
    alice = add(database, "alice")
    with database.write() as session:
        session.add(rows.pool())

    def reserve(session: Session) -> None:
        capacity.reserve(session, settings, alice.id, "default", size, count)

    if code is not None:
        assert "Delete some" in refused(database, code, reserve).detail
    else:
        with database.write() as session:
            reserve(session)
    with database.read() as session:
        user = session.get_one(User, alice.id)
        charged = (user.used_size, user.used_count, session.get_one(Pool, "default").promised)
    assert charged == ((0, 0, 0) if code else (size, count, size))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"state": "unusable", "reason": "it is away"}, "pool-unusable"),
        ({"free": 9, "low_space": 10}, "pool-low-space"),
        ({"size": 10, "promised": 39}, "pool-overcommitted"),
    ],
)
def test_a_pool_refuses_before_it_breaks_and_nobody_is_charged(
    database: Database, settings: Settings, values: dict[str, Any], code: str
) -> None:
    alice = add(database, "alice")
    with database.write() as session:
        session.add(rows.pool(**values))
    assert refused(database, code, lambda s: capacity.reserve(s, settings, alice.id, "default", 2)).status == 409
    with database.write() as session:
        assert session.get_one(User, alice.id).used_size == 0
        session.execute(update(Pool).values(state="active", free=100, size=100, promised=0))
        capacity.reserve(session, settings, alice.id, "default", 2)
        capacity.release(session, alice.id, "default", 2)
    with database.read() as session:
        assert (session.get_one(User, alice.id).used_count, session.get_one(Pool, "default").promised) == (0, 0)
