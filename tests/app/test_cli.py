"""`stratus-storage` on a home whose service does not run: accounts, keys, events, and what it says when it cannot."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from app.auth import sign_in
from app.cli import main
from app.config import load
from app.errors import Problem
from app.service import Service
from app.supervisor import prepare

Run = Callable[..., Result]


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
    assert "last admin" in run("user", "disable", "admin", code=1).stderr
    run("user", "add", "second", "--role", "admin")
    run("user", "disable", "admin")


def test_tokens_are_revoked_by_their_id(run: Run, home: Path) -> None:
    token = run("token", "create", "admin").stdout
    with sqlite3.connect(home / "stratus.db") as database:
        (found,) = database.execute("SELECT id FROM tokens ORDER BY id DESC LIMIT 1").fetchone()
    run("token", "revoke", found)
    with pytest.raises(Problem, match="token-revoked"):
        role(home, bearer(token))
    assert "no token" in run("token", "revoke", found, code=1).stderr
    run("token", "revoke", "nonsense", code=2)


def test_nodes_groups_and_quotas(run: Run, home: Path) -> None:
    token = run("node", "add", "n1", "iqn.2026-11.org.example:n1").stdout
    assert role(home, bearer(token)) == "node"
    assert "belongs to somebody" in run("node", "add", "n1", "iqn.2026-11.org.example:n1", code=1).stderr
    run("user", "add", "alice")
    run("group", "set", "friends", "alice")
    run("group", "set", "friends", "alice", "admin")
    assert "nobody" in run("group", "set", "friends", "nobody", code=1).stderr
    run("quota", "set", "alice", "--size", "5GiB", "--count", "3")
    with sqlite3.connect(home / "stratus.db") as database:
        assert database.execute("SELECT count(*) FROM group_members").fetchone() == (2,)
        assert database.execute("SELECT quota_size, quota_count FROM users WHERE name = 'alice'").fetchone() == (
            5 << 30,
            3,
        )


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


def test_a_user_that_is_not_there_is_exit_1(run: Run) -> None:
    for argv in (
        ("token", "create", "nobody"),
        ("user", "disable", "nobody"),
        ("quota", "set", "nobody", "--count", "1"),
    ):
        assert "nobody" in run(*argv, code=1).stderr


def test_a_home_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    assert "does not exist" in run("user", "add", "x", "--home", str(tmp_path / "none"), code=2).stderr
    assert not (tmp_path / "none").exists()


def test_keys_are_rotated_and_the_old_ones_kept(run: Run, home: Path) -> None:
    before = json.loads((home / "keys" / "secrets.json").read_text())
    said = run("rotate-keys").stdout
    after = json.loads((home / "keys" / "secrets.json").read_text())
    assert after["current"] in said
    assert set(after["keys"]) == {*before["keys"], after["current"]}


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
    events.sign_head(service.database, signer, home / "log" / "event-heads.jsonl")
    public = (home / "keys" / "events.pub").read_text().strip()
    assert run("verify-events", "--pubkey", public).stdout == "2 events hold, 1 signed heads agree, 0 not sealed yet\n"
    assert "BROKEN" in run("verify-events", "--pubkey", "A" * 44, code=1).stderr
    with sqlite3.connect(home / "stratus.db") as database:
        database.execute("UPDATE events SET actor = 'mallory' WHERE sequence = 1")
    assert "BROKEN: event 1" in run("verify-events", code=1).stderr


def test_reconcile_says_when_no_worker_answers(run: Run) -> None:
    assert "is it running?" in run("reconcile", "--dry-run", "--timeout", "0.2", code=1).stderr


def test_upgrade_says_where_the_database_is(run: Run, home: Path) -> None:
    assert run("upgrade").stdout == f"sqlite:///{home}/stratus.db is at head\n"


def test_serving_in_the_clear_is_refused(run: Run) -> None:
    assert "without TLS" in run("serve", "--listen", "0.0.0.0:8080", code=2).stderr
    assert "numeric" in run("serve", "--portal", "storage.example:3260", code=2).stderr


def test_every_command_explains_itself(run: Run) -> None:
    for name in main.commands:
        assert "Usage:" in run(name, "--help").stdout
