"""`stratus-storage` on a home whose service does not run: accounts, keys, events, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import pwd
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

import stratus.errors
from app.auth import sign_in
from app.cli import main
from app.commands.common import EXIT_OF_STATUS
from app.config import load
from app.errors import Problem
from app.models import User
from app.service import Service
from app.supervisor import prepare

Run = Callable[..., Result]
NOT_FOUND, CONFLICT, TIMEOUT, UNAVAILABLE = 3, 4, 6, 7


@pytest.fixture
def home(tmp_path: Path) -> Path:
    prepared = tmp_path / "home"
    prepare(load(prepared, environ={}))
    return prepared


@pytest.fixture
def run(home: Path) -> Run:
    def invoke(*argv: str, code: int = 0, text: str | None = None) -> Result:
        done = CliRunner(env={"STRATUS_HOME": str(home)}).invoke(main, argv, input=text)
        assert done.exit_code == code, f"{done.output} {done.exception!r}"
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    return invoke


def role(home: Path, header: str) -> str:
    service = Service(load(home, environ={}))
    with service.database.read() as session:
        return sign_in(session, header, None).role


def listed(run: Run, *argv: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(*argv, "--format", "json").stdout)
    return found


def bearer(token: str) -> str:
    return f"Bearer {token.strip()}"


def test_users_get_passwords_and_tokens(run: Run, home: Path) -> None:
    import base64

    run("user", "add", "alice", "--password-file", "-", text="correct horse battery\nmore\n")
    basic = "Basic " + base64.b64encode(b"alice:correct horse battery").decode()
    assert role(home, basic) == "user"
    run("user", "password", "alice", "--password-file", "-", text="another long password\n")
    with pytest.raises(Problem, match="password-invalid"):
        role(home, basic)
    token = run("token", "create", "alice", "--days", "1", "--description", "d").stdout
    assert role(home, bearer(token)) == "user"
    run("user", "disable", "alice")
    with pytest.raises(Problem, match="account-disabled"):
        role(home, bearer(token))


def test_the_first_admin_has_a_token_in_the_home(run: Run, home: Path) -> None:
    assert role(home, bearer((home / "admin.token").read_text())) == "admin"
    assert "last admin" in run("user", "disable", "admin", code=CONFLICT).stderr
    run("user", "add", "second", "--role", "admin")
    run("user", "disable", "admin")
    with pytest.raises(Problem, match="account-disabled"):
        role(home, bearer((home / "admin.token").read_text()))
    run("user", "enable", "admin")
    assert role(home, bearer((home / "admin.token").read_text())) == "admin"


def test_tokens_are_revoked_by_their_id(run: Run, home: Path) -> None:
    token = run("token", "create", "admin").stdout
    found = listed(run, "token", "list")[-1]["id"]
    run("token", "revoke", found)
    with pytest.raises(Problem, match="token-revoked"):
        role(home, bearer(token))
    assert "no token" in run("token", "revoke", found, code=NOT_FOUND).stderr
    run("token", "revoke", "nonsense", code=2)


def test_nodes_groups_and_quotas(run: Run, home: Path) -> None:
    token = run("node", "add", "n1", "iqn.2026-11.org.example:n1").stdout
    assert role(home, bearer(token)) == "node"
    assert "belongs to somebody" in run("node", "add", "n1", "iqn.2026-11.org.example:n1", code=CONFLICT).stderr
    run("user", "add", "alice")
    run("group", "set", "friends", "alice")
    run("group", "set", "friends", "alice", "admin")
    assert "nobody" in run("group", "set", "friends", "nobody", code=NOT_FOUND).stderr
    assert [(each["name"], each["members"]) for each in listed(run, "group", "list")] == [
        ("friends", ["admin", "alice"])
    ]
    assert [(each["name"], each["initiator"]) for each in listed(run, "node", "list")] == [
        ("n1", "iqn.2026-11.org.example:n1")
    ]
    assert [each["name"] for each in listed(run, "user", "list")] == ["admin", "alice"]


def test_a_quota_changes_only_where_it_is_told_to(run: Run, home: Path) -> None:
    site = load(home, environ={}).quota

    def allowed() -> tuple[int, int]:
        (found,) = listed(run, "quota", "show", "admin")
        return found["size"], found["count"]

    assert allowed() == (site.size, site.count)
    run("quota", "set", "admin", "--size", "5")
    assert allowed() == (5 << 30, site.count)
    run("quota", "set", "admin", "--count", "0")
    assert allowed() == (5 << 30, 0)
    run("quota", "set", "admin", "--size", "1.5MiB")
    assert allowed() == (3 << 19, 0)
    run("quota", "set", "admin", "--default", "--count", "2")
    assert allowed() == (site.size, 2)
    run("quota", "set", "admin", "--default")
    assert allowed() == (site.size, site.count)
    assert "--default" in run("quota", "set", "admin", code=2).stderr


def test_lists_are_tables_for_people(run: Run) -> None:
    run("user", "add", "alice")
    run("token", "create", "alice", "--description", "of her \u202e laptop")
    lines = run("token", "list", "alice").stdout.splitlines()
    assert lines[0].split() == ["ID", "USER", "DESCRIPTION", "CREATED_AT", "EXPIRES_AT", "REVOKED_AT"]
    assert len(lines) == 2
    assert "of her \\u202e laptop" in lines[1]
    assert len(run("token", "list").stdout.splitlines()) == 3
    assert run("quota", "show", "alice").stdout.splitlines()[1].split() == ["alice", "10TiB", "0B", "1000", "0"]
    assert run("pools").stdout.split() == ["NAME", "STATE", "SIZE", "FREE", "ALLOCATED", "PROMISED", "ALARM", "REASON"]


def test_lists_have_all_pages(run: Run, home: Path) -> None:
    from app import accounts
    from app.events import Actor

    service = Service(load(home, environ={}))
    with service.database.write() as session:
        admin = session.scalars(select(User)).one()
        for _ in range(1001):
            accounts.issue_token(session, Actor("test"), admin, None)
    assert len({each["id"] for each in listed(run, "token", "list")}) == 1002


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("user", "add", "two words"), "name"),
        (("user", "add", "x", "--role", "god"), "god"),
        (("node", "add", "n", "not-an-iqn"), "initiator"),
        (("quota", "set", "admin", "--size", "lots"), "lots"),
        (("token", "create", "admin", "--days", "0"), "--days"),
        (("upgrade", "--revision", "nonsense"), "nonsense"),
    ],
)
def test_a_wrong_argument_is_exit_2_and_named(run: Run, argv: tuple[str, ...], says: str) -> None:
    assert says in run(*argv, code=2).stderr


def test_a_short_password_is_refused(run: Run) -> None:
    assert "password" in run("user", "add", "x", "--password-file", "-", text="short\n", code=2).stderr


def test_who_is_not_there_is_not_found(run: Run) -> None:
    for argv in (
        ("token", "create", "nobody"),
        ("user", "disable", "nobody"),
        ("user", "enable", "nobody"),
        ("token", "list", "nobody"),
        ("quota", "set", "nobody", "--count", "1"),
        ("quota", "show", "nobody"),
    ):
        assert "nobody" in run(*argv, code=NOT_FOUND).stderr


def test_exit_codes_are_those_of_the_users_commands() -> None:
    assert EXIT_OF_STATUS == stratus.errors.EXIT_OF_STATUS


def test_a_home_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    assert "is no service's home" in run("user", "add", "x", "--home", str(tmp_path / "none"), code=2).stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "argv",
    [("user", "list"), ("user", "add", "x"), ("pools",), ("reconcile",), ("verify-events",), ("rotate-keys",)],
    ids=" ".join,
)
def test_a_directory_is_no_home_and_stays_as_it_is(run: Run, tmp_path: Path, argv: tuple[str, ...]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    told = run(*argv, "--home", str(other), code=2).stderr
    assert f"{other} is no service's home: run `stratus-storage serve --home {other}` or `upgrade` first" in told
    assert list(other.iterdir()) == []


def test_a_database_of_another_version_is_not_touched(run: Run, home: Path) -> None:
    with sqlite3.connect(home / "stratus.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'of-tomorrow'")
    assert "is no service's home" in run("user", "list", code=2).stderr


def test_what_the_host_refuses_is_one_line(run: Run, home: Path) -> None:
    (home / "stratus.db").write_bytes(b"no database" * 1000)
    for name in ("stratus.db-wal", "stratus.db-shm"):
        (home / name).unlink(missing_ok=True)
    told = run("user", "list", code=UNAVAILABLE).stderr
    assert "file is not a database" in told
    assert len(told.splitlines()) == 1
    (home / "log").rmdir()
    (home / "log").write_text("in the way")
    assert "File exists" in run("upgrade", code=UNAVAILABLE).stderr


def test_a_home_of_somebody_else_is_refused(run: Run, tmp_path: Path) -> None:
    """The suite runs as root, as the operator who forgot `sudo -u` does."""
    for owner, told in ((pwd.getpwnam("nobody").pw_uid, "sudo -u 'nobody'"), (54321, "sudo -u '#54321'")):
        theirs = tmp_path / f"of-{owner}"
        theirs.mkdir()
        os.chown(theirs, owner, -1)
        for argv in (("user", "list"), ("upgrade",), ("serve",), ("rotate-keys",), ("worker",)):
            assert told in run(*argv, "--home", str(theirs), code=2).stderr
        assert list(theirs.iterdir()) == []


def test_keys_are_rotated_and_the_old_ones_kept(run: Run, home: Path) -> None:
    before = json.loads((home / "keys" / "secrets.json").read_text())
    said = run("rotate-keys").stdout
    after = json.loads((home / "keys" / "secrets.json").read_text())
    assert after["current"] in said
    assert set(after["keys"]) == {*before["keys"], after["current"]}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"current": "a", "keys": {"a": "?"}}', '{"current": 1, "keys": 2}'])
def test_a_broken_key_ring_is_said_and_kept(run: Run, home: Path, text: str) -> None:
    ring = home / "keys" / "secrets.json"
    ring.write_text(text)
    assert "is no key ring" in run("rotate-keys", code=1).stderr
    assert ring.read_text() == text
    ring.chmod(0o644)
    assert "chmod 600" in run("rotate-keys", code=1).stderr


def test_the_configuration_in_force_is_printed_without_secrets(run: Run, home: Path) -> None:
    (home / "config.toml").write_text('[database]\nurl = "postgresql+psycopg://u:sesame@h/d"\n[server]\nthreads = 5\n')
    shown = json.loads(run("config").stdout)
    assert shown["server"]["threads"] == 5
    assert "sesame" not in json.dumps(shown)
    (home / "config.toml").write_text("[server]\nthread = 5\n")
    assert "server.thread" in run("config", code=2).stderr


def test_events_are_verified_and_a_changed_one_is_found(run: Run, home: Path) -> None:
    from app import events
    from app.keys import Signer

    service = Service(load(home, environ={}))
    signer = Signer.load_or_create(home / "keys" / "events.key")
    assert "not sealed yet" in run("verify-events").stdout
    assert events.seal(service.database) == 2
    heads, copy = home / "log" / "event-heads.jsonl", home / "copy.jsonl"
    copy.touch()
    told = f"no signed heads found in {heads}: the tail is not protected"
    assert told in run("verify-events").stderr
    assert f"found in {copy}" in run("verify-events", "--heads", str(copy), code=1).stderr
    run("verify-events", "--heads", str(home / "none"), code=2)
    events.sign_head(service.database, signer, heads)
    public = (home / "keys" / "events.pub").read_text().strip()
    assert run("verify-events", "--pubkey", public).stdout == "2 events hold, 1 signed heads agree, 0 not sealed yet\n"
    assert "BROKEN" in run("verify-events", "--pubkey", "A" * 44, code=1).stderr
    with sqlite3.connect(home / "stratus.db") as database:
        database.execute("UPDATE events SET actor = 'mallory' WHERE sequence = 1")
    assert "BROKEN: event 1" in run("verify-events", code=1).stderr


def test_heads_are_signed_with_the_homes_key_or_with_one_that_is_named(run: Run, home: Path) -> None:
    from app import events
    from app.keys import Signer

    service = Service(load(home, environ={}))
    heads = home / "log" / "event-heads.jsonl"
    first = Signer.load_or_create(home / "keys" / "events.key")
    events.seal(service.database)
    events.sign_head(service.database, first, heads)
    run("verify-events")
    (home / "keys" / "events.key").unlink()  # lost, and made anew
    second = Signer.load_or_create(home / "keys" / "events.key")
    run("user", "add", "x")
    events.seal(service.database)
    events.sign_head(service.database, second, heads)
    assert "the signature in line 1 " in run("verify-events", code=1).stderr
    assert "the signature in line 2 " in run("verify-events", "--pubkey", first.public, code=1).stderr
    assert "2 signed heads agree" in run("verify-events", "--pubkey", first.public, "--pubkey", second.public).stdout


def test_what_the_worker_does_not_do_in_time(run: Run, home: Path) -> None:
    assert "is it running?" in run("reconcile", "--dry-run", "--timeout", "0.2", code=TIMEOUT).stderr
    assert "no volume" in run("reset-state", str(UUID(int=7)), code=NOT_FOUND).stderr


def test_upgrade_says_where_the_database_is(run: Run, home: Path) -> None:
    assert run("upgrade").stdout == f"sqlite:///{home}/stratus.db is at head\n"


def test_serving_in_the_clear_is_refused(run: Run) -> None:
    assert "without TLS" in run("serve", "--listen", "0.0.0.0:8080", code=2).stderr
    assert "numeric" in run("serve", "--portal", "storage.example:3260", code=2).stderr


def test_every_command_explains_itself(run: Run) -> None:
    for name, command in main.commands.items():
        assert "Usage:" in run(name, "--help").stdout
        for inner in getattr(command, "commands", {}):
            assert "Usage:" in run(name, inner, "--help").stdout
