"""Every stratus-* command against the real service: what it prints, its formats, its exit codes, and real I/O."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.initiator import Initiator
from tests.support.service import RunningService, free_port, initiator_of, running

MIB = 1 << 20
HOST = "iqn.2004-10.org.example:host"
OTHER = "iqn.2004-10.org.example:other"
OK, FAILED, USAGE, NOT_FOUND, CONFLICT, AUTH, UNAVAILABLE = 0, 1, 2, 3, 4, 5, 7
NOWHERE = str(uuid.UUID(int=7))


class User:
    """Somebody at a shell, signed in with a token of their own."""

    def __init__(self, service: RunningService, token: str, name: str = "") -> None:
        self.service, self.token, self.name = service, token, name

    def run(self, *argv: str, code: int = OK) -> subprocess.CompletedProcess[str]:
        done = self.service.command(f"stratus-{argv[0]}", *argv[1:], token=self.token, check=False)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *argv: str) -> Any:
        return json.loads(self.run(*argv, "--format", "json").stdout)

    def create(self, *argv: str) -> str:
        """The id of a new volume of 64 MiB, or of what `argv` asks for."""
        return str(self.json("create-volume", *(argv or ("-s", "64MiB")))["id"])

    def attach(self, volume: str, file: Path, *argv: str) -> Initiator:
        self.run("attach-volume", volume, "--initiator", HOST, "--connection-file", str(file), *argv)
        return initiator_of({"connection": json.loads(file.read_text()), "initiator": HOST})


@pytest.fixture
def alice(service: RunningService) -> User:
    return new_user(service, "alice")


@pytest.fixture
def bob(service: RunningService) -> User:
    return new_user(service, "bob")


def new_user(service: RunningService, name: str) -> User:
    """A user of that name whom no other test knows."""
    unique = f"{name}-{uuid.uuid4().hex[:8]}"
    return User(service, str(service.user(unique).headers["Authorization"]).removeprefix("Bearer "), unique)


# ---------------------------------------------------------------- volumes


def test_a_volume_from_its_creation_to_its_end(alice: User, tmp_path: Path) -> None:
    volume = alice.create("-s", "0.0625", "-t", "data")
    first = alice.attach(volume, tmp_path / "first.json")
    first.write(0, 0x5A, MIB)
    assert first.size() == 64 * MIB
    alice.run("update-volume", volume, "-s", "96MiB")
    assert first.size() == 96 * MIB
    assert "attachment " in alice.run("detach-volume", volume).stderr
    assert first.login_error() is not None
    second = alice.attach(volume, tmp_path / "second.json")
    second.read(0, MIB, 0x5A)
    alice.run("detach-volume", alice.json("describe-attachments", "--volume", volume)[0]["id"])
    assert f"volume {volume} deleted" in alice.run("delete-volume", volume).stderr
    assert alice.json("describe-volumes") == []
    assert alice.run("describe-volumes", volume, code=NOT_FOUND).stderr.startswith(f"Error: {volume}: ")


def test_one_volume_in_every_format(alice: User) -> None:
    volume = alice.create("-s", "64MiB", "-t", 'with "quotes", and a comma')
    table = alice.run("describe-volumes").stdout.splitlines()
    assert table[0].split() == ["ID", "NAME", "SIZE", "STATE", "OWNER", "VISIBILITY", "POOL", "ATTACHMENTS"]
    assert "64MiB" in table[1]
    assert table[1].startswith(volume)
    rows = list(csv.DictReader(io.StringIO(alice.run("describe-volumes", "--format", "csv").stdout)))
    assert [(row["id"], row["name"], row["size"]) for row in rows] == [
        (volume, 'with "quotes", and a comma', str(64 * MIB))
    ]
    record = alice.json("describe-volumes", volume)[0]
    assert (record["id"], record["size"], record["state"]) == (volume, 64 * MIB, "available")


def test_filters(alice: User) -> None:
    ids = {tag: alice.create("-s", size, "-t", tag) for tag, size in (("run-1", "1MiB"), ("run-2", "2MiB"))}
    other = alice.create("-s", "2MiB", "-t", "rerun-2", "--public")

    def found(*filters: str) -> set[str]:
        options = [word for each in filters for word in ("-f", each)]
        return {each["id"] for each in alice.json("describe-volumes", *options) if each["owner"] == alice.name}

    assert found("tag:^run-") == set(ids.values())
    assert found("tag:run-") == {*ids.values(), other}
    assert found("size:^2MiB$") == {ids["run-2"], other}
    assert found(f"size:^{2 * MIB}$", "visibility:^private$") == {ids["run-2"]}
    assert found("state:error") == set()
    assert "fields are" in alice.run("describe-volumes", "-f", "colour:red", code=USAGE).stderr
    assert "regular expression" in alice.run("describe-volumes", "-f", "tag:(", code=USAGE).stderr
    alice.run("delete-volume", other)  # since it is everybody's


def test_more_volumes_than_a_page_holds(alice: User) -> None:
    made = {alice.service.admin.make_volume(MIB, name="one of many")["id"] for _ in range(51)}
    admin = User(alice.service, alice.service.admin_token)
    assert {each["id"] for each in admin.json("describe-volumes", "-f", "tag:^one of many$")} == made
    admin.run("delete-volume", *made)


def test_update(alice: User, bob: User) -> None:
    volume = alice.create()
    bob.run("describe-volumes", volume, code=NOT_FOUND)
    alice.run("update-volume", volume, "-t", "renamed", "--public")
    record = bob.json("describe-volumes", volume)[0]
    assert (record["name"], record["visibility"]) == ("renamed", "public")
    bob.run("update-volume", volume, "-t", "mine", code=AUTH)
    alice.run("update-volume", volume, "--private")
    bob.run("describe-volumes", volume, code=NOT_FOUND)
    assert "shrink-refused" in alice.run("update-volume", volume, "-s", "1MiB", code=CONFLICT).stderr
    assert "nothing to change" in alice.run("update-volume", volume, code=USAGE).stderr


def test_what_is_refused_for_one_does_not_keep_the_others(alice: User, tmp_path: Path) -> None:
    held, free = alice.create(), alice.create()
    alice.attach(held, tmp_path / "held.json")
    done = alice.run("delete-volume", held, free, NOWHERE, code=CONFLICT)
    assert "volume-in-use" in done.stderr
    assert "volume-not-found" in done.stderr
    assert "detach it first: stratus-detach-volume" in done.stderr
    assert [each["id"] for each in alice.json("describe-volumes")] == [held]


def test_plans_change_nothing(alice: User, tmp_path: Path) -> None:
    volume = alice.create()
    alice.attach(volume, tmp_path / "connection.json")
    before = alice.json("describe-volumes")
    refused = alice.run("delete-volume", volume, "--dry-run", code=CONFLICT)
    assert "volume-in-use" in refused.stdout
    assert "this would be refused" in refused.stderr
    plan = alice.json("create-volume", "-s", "64MiB", "--dry-run")
    assert plan["allowed"]
    assert plan["quota"]["used_size"] == 128 * MIB
    for argv in (
        ("update-volume", volume, "-s", "96MiB"),
        ("detach-volume", volume),
        ("attach-volume", alice.create(), "--initiator", HOST),
    ):
        assert "nothing was changed (--dry-run)" in alice.run(*argv, "--dry-run").stderr
    assert [each for each in alice.json("describe-volumes") if each["id"] == volume] == before
    assert len(alice.json("describe-attachments")) == 1


def test_long_work_can_be_left_and_waited_for(alice: User) -> None:
    source = alice.create()
    operation = alice.json("create-volume", "--volume", source, "--no-wait")
    assert (operation["kind"], operation["resource"]["kind"]) == ("volume.clone", "volume")
    ended = alice.json("describe-operations", "--wait", operation["id"])
    assert [(each["state"], each["progress"]) for each in ended] == [("succeeded", 100)]
    assert alice.json("describe-volumes", operation["resource"]["id"])[0]["origin"]["id"] == source
    assert alice.json("describe-operations") == []
    assert operation["id"] in {each["id"] for each in alice.json("describe-operations", "--all")}


# ---------------------------------------------------------------- snapshots


def test_snapshots(alice: User, tmp_path: Path) -> None:
    volume = alice.create()
    alice.attach(volume, tmp_path / "c.json").write(0, 0x11, MIB)
    alice.run("detach-volume", volume)
    snapshot = alice.json("create-snapshot", volume, "-t", "before-upgrade")["id"]
    alice.attach(volume, tmp_path / "c.json").write(0, 0x22, MIB)
    assert "volume-in-use" in alice.run("revert-volume", volume, "--snapshot", snapshot, code=CONFLICT).stderr
    alice.run("detach-volume", volume)
    copy = alice.create("--snapshot", snapshot)
    assert [each["id"] for each in alice.json("describe-snapshots", "-f", "tag:^before-")] == [snapshot]
    assert alice.json("describe-snapshots", "--volume", copy) == []
    assert "VOLUME" in alice.run("describe-snapshots", snapshot).stdout
    alice.attach(copy, tmp_path / "c.json").read(0, MIB, 0x11)
    alice.attach(volume, tmp_path / "d.json").read(0, MIB, 0x22)
    alice.run("detach-volume", volume)
    alice.run("revert-volume", volume, "--snapshot", snapshot)
    alice.attach(volume, tmp_path / "d.json").read(0, MIB, 0x11)
    assert "snapshot-of-another" in alice.run("revert-volume", copy, "--snapshot", snapshot, code=CONFLICT).stderr
    alice.run("delete-snapshot", snapshot)
    alice.run("describe-snapshots", snapshot, code=NOT_FOUND)
    alice.run("create-snapshot", NOWHERE, code=NOT_FOUND)


# ---------------------------------------------------------------- attachments


def test_the_connection_is_for_its_owner_only(alice: User, bob: User, tmp_path: Path) -> None:
    volume, file = alice.create(), tmp_path / "connection.json"
    table = alice.run("attach-volume", volume, "--initiator", HOST, "--connection-file", str(file)).stdout
    connection = json.loads(file.read_text())
    password = connection["auth"]["password"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert password not in table
    assert connection["target"] in table
    attachment = alice.json("describe-attachments", "--volume", volume)[0]["id"]
    again = alice.run("describe-attachments", attachment, "--connection", "--show-secret").stdout
    assert password in again
    assert alice.json("describe-attachments", attachment, "--connection")["connection"] == connection
    bob.run("describe-attachments", attachment, "--connection", code=NOT_FOUND)
    admin = User(alice.service, alice.service.admin_token)
    assert "not-your-connection" in admin.run("describe-attachments", attachment, "--connection", code=AUTH).stderr
    assert "force-required" in admin.run("detach-volume", volume, code=CONFLICT).stderr
    admin.run("detach-volume", volume, "--force")
    ended = alice.run("describe-attachments", attachment, "--connection", code=CONFLICT)
    assert "attach the volume again: stratus-attach-volume" in ended.stderr
    assert alice.json("describe-attachments") == []
    assert alice.json("describe-attachments", attachment)[0]["state"] == "detached"


def test_one_writes_or_many_read(alice: User, tmp_path: Path) -> None:
    volume = alice.create()
    alice.attach(volume, tmp_path / "rw.json").write(0, 0x33, MIB)
    refused = alice.run("attach-volume", volume, "--initiator", OTHER, code=CONFLICT)
    assert "volume-in-use" in refused.stderr
    assert "see who holds it with: stratus-describe-volumes" in refused.stderr
    alice.run("detach-volume", volume)
    reader = alice.attach(volume, tmp_path / "ro.json", "--mode", "ro")
    reader.read(0, MIB, 0x33)
    with pytest.raises(AssertionError):
        reader.write(0, 0x34, MIB)
    alice.run("attach-volume", volume, "--initiator", OTHER, "--mode", "ro")
    assert "2 attachments" in alice.run("detach-volume", volume, code=CONFLICT).stderr
    alice.run("detach-volume", volume, "--all")
    assert "is not attached" in alice.run("detach-volume", volume, code=CONFLICT).stderr
    alice.run("detach-volume", NOWHERE, code=NOT_FOUND)


def test_mutual_chap(alice: User, tmp_path: Path) -> None:
    initiator = alice.attach(alice.create(), tmp_path / "c.json", "--mutual-chap")
    assert initiator.mutual is not None
    assert initiator.login_error() is None
    name, secret = initiator.mutual
    initiator.mutual = (name, secret[::-1])
    assert initiator.login_error() is not None
    initiator.mutual = None
    initiator.write(0, 0x44, MIB)


def test_an_initiator_must_be_one(alice: User, tmp_path: Path) -> None:
    volume, file = alice.create(), tmp_path / "c.json"
    assert "an initiator is needed" in alice.run("attach-volume", volume, code=USAGE).stderr
    alice.run("attach-volume", volume, "--initiator", "me", code=USAGE)
    alice.run("attach-volume", "not-an-id", "--initiator", HOST, code=USAGE)
    nodes = f"iqn.2004-10.org.example:{uuid.uuid4().hex}"
    alice.service.storage("node", "add", f"n-{uuid.uuid4().hex[:8]}", nodes)
    assert "initiator-of-a-node" in alice.run("attach-volume", volume, "--initiator", nodes, code=AUTH).stderr
    missing = str(tmp_path / "missing" / "c.json")
    alice.run("attach-volume", volume, "--initiator", HOST, "--connection-file", missing, code=USAGE)
    assert alice.json("describe-attachments") == []
    assert not file.exists()


def test_sharing(alice: User, bob: User, tmp_path: Path) -> None:
    volume, group = alice.create(), f"lab-{uuid.uuid4().hex[:8]}"
    alice.service.storage("group", "set", group, alice.name, bob.name)
    alice.attach(volume, tmp_path / "a.json").write(0, 0x55, MIB)
    alice.run("detach-volume", volume)
    alice.run("share-volume", volume, "--group", group)
    assert alice.json("share-volume", volume, "--list") == [{"group": group, "mode": "ro"}]
    assert "read-only-access" in bob.run("attach-volume", volume, "--initiator", HOST, code=AUTH).stderr
    bob.attach(volume, tmp_path / "b.json", "--mode", "ro").read(0, MIB, 0x55)
    bob.run("detach-volume", volume)
    alice.run("share-volume", volume, "--group", group, "--mode", "rw")
    bob.attach(volume, tmp_path / "b.json").write(0, 0x56, MIB)
    bob.run("detach-volume", volume)
    bob.run("delete-volume", volume, code=AUTH)
    alice.run("share-volume", volume, "--group", group, "--remove")
    bob.run("describe-volumes", volume, code=NOT_FOUND)
    alice.run("share-volume", volume, "--group", "nobody-knows", code=NOT_FOUND)


# ---------------------------------------------------------------- sign-in, no service


def test_sign_in(service: RunningService, tmp_path: Path) -> None:
    assert "token-invalid" in User(service, "stratus_wrong").run("describe-volumes", code=AUTH).stderr
    name, first, second = f"eve-{uuid.uuid4().hex[:8]}", tmp_path / "first", tmp_path / "second"
    for file, password in ((first, "a first password"), (second, "another password")):
        file.touch(0o600)
        file.write_text(password + "\n")
    service.storage("user", "add", name, "--password-file", str(first))
    signed_in = ("--endpoint", service.base, "--username", name, "--password-file")
    nobody = User(service, "stratus_wrong")
    nobody.run("describe-volumes", *signed_in, str(first))
    service.storage("user", "password", name, "--password-file", str(second))
    assert "password-invalid" in nobody.run("describe-volumes", *signed_in, str(first), code=AUTH).stderr
    nobody.run("describe-volumes", *signed_in, str(second))
    service.storage("user", "disable", name)
    assert "account-disabled" in nobody.run("describe-volumes", *signed_in, str(second), code=AUTH).stderr
    first.chmod(0o644)
    assert "chmod 600" in nobody.run("describe-volumes", *signed_in, str(first), code=USAGE).stderr


def test_no_service(alice: User) -> None:
    done = alice.run("describe-volumes", "--endpoint", f"http://127.0.0.1:{free_port()}", code=UNAVAILABLE)
    assert "is the service running" in done.stderr


def test_completion_offers_the_users_volumes(alice: User) -> None:
    volume = alice.create()
    assert "stratus-delete-volume" in alice.run("completion", "bash").stdout
    alice.service.environment |= {
        "_STRATUS_DELETE_VOLUME_COMPLETE": "bash_complete",
        "COMP_WORDS": f"stratus-delete-volume {volume[:4]}",
        "COMP_CWORD": "1",
    }
    try:
        assert volume in alice.run("delete-volume").stdout
    finally:
        for name in ("_STRATUS_DELETE_VOLUME_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            del alice.service.environment[name]


# ---------------------------------------------------------------- stratus-storage: accounts


def listed(service: RunningService, *argv: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(service.storage(*argv, "--format", "json").stdout)
    return found


def test_users_and_tokens(service: RunningService) -> None:
    name = f"frank-{uuid.uuid4().hex[:8]}"
    service.storage("user", "add", name)
    assert "belongs to somebody already" in service.storage("user", "add", name, code=CONFLICT).stderr
    argv = ("token", "create", name, "--description", "laptop", "--days", "1")
    token = service.command("stratus-storage", *argv).stdout.strip()
    frank = User(service, token)
    frank.run("describe-volumes")
    (record,) = listed(service, "token", "list", name)
    assert (record["description"], record["revoked_at"]) == ("laptop", None)
    made, over = (datetime.fromisoformat(record[each]) for each in ("created_at", "expires_at"))
    assert abs(made - datetime.now(UTC)) < timedelta(minutes=1)
    assert abs(over - made - timedelta(days=1)) < timedelta(minutes=1)
    made, over = (datetime.fromisoformat(record[each]) for each in ("created_at", "expires_at"))
    assert abs(made - datetime.now(UTC)) < timedelta(minutes=1)
    assert abs(over - made - timedelta(days=1)) < timedelta(minutes=1)
    service.storage("user", "disable", name)
    assert "account-disabled" in frank.run("describe-volumes", code=AUTH).stderr
    assert {each["name"]: each["enabled"] for each in listed(service, "user", "list")}[name] is False
    service.storage("user", "enable", name)
    frank.run("describe-volumes")
    service.storage("token", "revoke", record["id"])
    assert "token-revoked" in frank.run("describe-volumes", code=AUTH).stderr
    service.storage("token", "revoke", record["id"], code=NOT_FOUND)
    service.storage("token", "create", "nobody-knows", code=NOT_FOUND)
    assert "last admin" in service.storage("user", "disable", "admin", code=CONFLICT).stderr


def test_a_node_attaches_with_its_token(alice: User, bob: User, tmp_path: Path) -> None:
    name, initiator = f"node-{uuid.uuid4().hex[:8]}", f"iqn.2004-10.org.example:{uuid.uuid4().hex}"
    node = User(alice.service, alice.service.storage("node", "add", name, initiator).stdout.strip())
    volume, file = alice.create(), tmp_path / "node.json"
    argv = ("attach-volume", volume, "--initiator", initiator, "--connection-file", str(file), "--instance", "vm-1")
    assert "not-this-node" in node.run(*argv, "--node", "elsewhere", code=AUTH).stderr
    node.run(*argv, "--node", name)
    initiator_of({"connection": json.loads(file.read_text()), "initiator": initiator}).write(0, 0x66, MIB)
    assert "attached-by-another" in alice.run("detach-volume", volume, code=CONFLICT).stderr
    bob.run("detach-volume", volume, code=NOT_FOUND)
    node.run("detach-volume", volume)
    assert alice.json("describe-volumes", volume)[0]["state"] == "available"
    assert initiator in {each["initiator"] for each in listed(alice.service, "node", "list")}


def test_groups(service: RunningService, alice: User, bob: User) -> None:
    name = f"group-{uuid.uuid4().hex[:8]}"
    for members in ({alice.name, bob.name}, {bob.name}, set()):
        service.storage("group", "set", name, *members)
        assert {each["name"]: set(each["members"]) for each in listed(service, "group", "list")}[name] == members
    assert "There is no user" in service.storage("group", "set", name, "nobody-knows", code=NOT_FOUND).stderr


def test_quotas(service: RunningService, alice: User) -> None:
    service.storage("quota", "set", alice.name, "--size", "100MiB", "--count", "2")
    first = alice.create()
    assert "quota-exceeded" in alice.run("create-volume", "-s", "64MiB", code=CONFLICT).stderr
    alice.run("create-snapshot", first, code=CONFLICT)
    alice.create("-s", "1MiB")
    assert "allowed are" in alice.run("create-volume", "-s", "1MiB", code=CONFLICT).stderr
    (shown,) = listed(service, "quota", "show", alice.name)
    assert (shown["size"], shown["used_size"], shown["count"], shown["used_count"]) == (100 * MIB, 65 * MIB, 2, 2)
    service.storage("quota", "set", alice.name, "--default")
    alice.create()
    service.storage("quota", "set", "nobody-knows", "--count", "1", code=NOT_FOUND)


# ---------------------------------------------------------------- stratus-storage: the service


def test_a_volume_in_error_is_looked_at_again(service: RunningService, alice: User) -> None:
    volume = alice.create()
    with closing(sqlite3.connect(service.home / "stratus.db", timeout=30)) as database, database:
        database.execute(
            "UPDATE volumes SET state = 'error', error = 'its disk was away' WHERE id = ?", (uuid.UUID(volume).hex,)
        )
    assert alice.json("describe-volumes", volume)[0]["state"] == "error"
    assert f"volume {volume} is available" in service.storage("reset-state", volume).stderr
    assert alice.json("describe-volumes", volume)[0]["state"] == "available"
    (told,) = service.admin.get("/v1/events", params={"kind": "volume.reset-state", "resource": volume}).json()["items"]
    assert (told["actor"], told["detail"]) == ("operator", {"before": "error"})
    service.storage("reset-state", NOWHERE, code=NOT_FOUND)


def test_pools_and_drift_for_programs(service: RunningService) -> None:
    (pool,) = json.loads(service.storage("pools", "--format", "json").stdout)
    assert pool == service.admin.get("/v1/pools").json()["items"][0] | {
        name: pool[name] for name in ("free", "allocated", "updated_at")
    }
    assert json.loads(service.storage("reconcile", "--dry-run", "--format", "json").stdout) == []


def test_drift_is_mended_and_a_state_derived_again(service: RunningService, alice: User) -> None:
    volume = alice.create()
    path, aside = service.backing(volume), service.home / "aside.raw"
    path.rename(aside)
    line = f"backing  {volume} volume {volume} has no backing -> mark it as in error\n"
    dry = service.storage("reconcile", "--dry-run")
    assert (dry.stdout, dry.stderr) == (line, "1 differences (nothing was changed)\n")
    assert [drift["volume_id"] for drift in listed(service, "reconcile")] == [volume]
    assert "volume-not-available" in alice.run("attach-volume", volume, "--initiator", HOST, code=CONFLICT).stderr
    assert "is error: " in service.storage("reset-state", volume).stderr
    aside.rename(path)
    assert "is available" in service.storage("reset-state", volume).stderr


def test_the_configuration_in_force_is_printed(service: RunningService) -> None:
    shown = json.loads(service.storage("config").stdout)
    assert shown["home"] == str(service.home)
    assert shown["attachments"]["direct"] is True
    service.environment["STRATUS_DATABASE__URL"] = "postgresql+psycopg://stratus:open-sesame@db/stratus"
    try:
        hidden = service.storage("config").stdout
    finally:
        del service.environment["STRATUS_DATABASE__URL"]
    assert "open-sesame" not in hidden
    assert "stratus:***@db" in hidden


def test_a_configuration_that_cannot_be_used_is_explained(service: RunningService, tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    for text, told in (
        ("[server]\nlisten = 1\n", "server.listen"),
        ("[server]\ncolour = 'red'\n", "server.colour"),
        ("default_pool = 'fast'\n[pools.slow]\npath = '/srv'\n", "there is no [pools.fast]"),
        ("[server", "other.toml"),
    ):
        file.write_text(text)
        assert told in service.storage("config", "--config", str(file), code=USAGE).stderr
    assert "no-such.toml" in service.storage("config", "--config", "no-such.toml", code=USAGE).stderr


def test_the_doctor_finds_a_host_that_serves_volumes(service: RunningService) -> None:
    found = {
        line.split()[1]: line.split()[0] for line in service.command("stratus-storage", "doctor").stdout.splitlines()
    }
    assert found["tgtd"] == found["target"] == found["sqlite"] == "ok"
    assert "missing" not in found.values()


def test_the_doctor_says_what_is_missing(service: RunningService) -> None:
    service.environment["STRATUS_POOLS__BAD__PATH"] = "/proc"
    service.environment["STRATUS_POOLS__DEFAULT__PATH"] = str(service.home / "pool")
    try:
        done = service.storage("doctor", code=FAILED)
    finally:
        for name in ("BAD", "DEFAULT"):
            del service.environment[f"STRATUS_POOLS__{name}__PATH"]
    assert any(line.startswith("missing  pool bad") for line in done.stdout.splitlines())


def test_only_one_serves_a_home(service: RunningService) -> None:
    argv = ("serve", "--listen", f"127.0.0.1:{free_port()}", "--portal", f"127.0.0.1:{free_port()}")
    done = service.command("stratus-storage", *argv, check=False)
    assert (done.returncode, "is being served already" in done.stderr) == (USAGE, True)
    service.storage("verify-events", "--home", "/nowhere-at-all", code=USAGE)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningService]:
    """A service that a test may do anything to."""
    environment = {"STRATUS_WORKER__HEAD_INTERVAL": "0.2", "STRATUS_SERVER__PROCESSES": "1"}
    with running(tmp_path / "home", environment) as started:
        yield started


def test_keys_are_rotated_under_live_attachments(own: RunningService, tmp_path: Path) -> None:
    alice = new_user(own, "alice")
    before, after = alice.create(), alice.create()
    old = alice.attach(before, tmp_path / "old.json")
    old.write(0, 0x77, MIB)
    ring = own.home / "keys" / "secrets.json"
    old_key = json.loads(ring.read_text())["current"]
    assert "restart the service" in own.storage("rotate-keys").stdout
    assert ring.stat().st_mode & 0o777 == 0o600
    assert json.loads(ring.read_text())["current"] != old_key
    own.restart()
    old.read(0, MIB, 0x77)
    attachment = alice.json("describe-attachments", "--volume", before)[0]["id"]
    told = alice.json("describe-attachments", attachment, "--connection")["connection"]
    assert told == json.loads((tmp_path / "old.json").read_text())
    new = alice.attach(after, tmp_path / "new.json")
    own.restart()
    new.write(0, 0x78, MIB)
    old.read(0, MIB, 0x77)
    with sqlite3.connect(own.home / "stratus.db") as database:
        keys = {key for (key,) in database.execute("SELECT key_id FROM connections")}
    database.close()
    assert keys == {old_key, json.loads(ring.read_text())["current"]}


def test_tampering_with_the_events_shows(own: RunningService) -> None:
    new_user(own, "alice").create()
    assert own.stop() == 0
    key = (own.home / "keys" / "events.pub").read_text().strip()
    verdict = own.storage("verify-events", "--pubkey", key).stdout
    assert "0 not sealed yet" in verdict
    assert not verdict.startswith("0 events")
    assert "BROKEN" in own.storage("verify-events", "--pubkey", "A" * 43 + "=", code=FAILED).stderr
    copy = own.home.parent / "heads-kept-elsewhere.jsonl"
    copy.write_bytes((own.home / "log" / "event-heads.jsonl").read_bytes())
    database = sqlite3.connect(own.home / "stratus.db", isolation_level=None)
    (actor,) = database.execute("SELECT actor FROM events WHERE sequence = 2").fetchone()
    database.execute("UPDATE events SET actor = 'mallory' WHERE sequence = 2")
    assert "event 2 (" in own.storage("verify-events", code=FAILED).stderr
    database.execute("UPDATE events SET actor = ? WHERE sequence = 2", (actor,))
    own.storage("verify-events")
    database.execute("DELETE FROM events WHERE sequence = (SELECT max(sequence) FROM events)")
    database.close()
    (own.home / "log" / "event-heads.jsonl").unlink()
    assert "the tail is not protected" in own.storage("verify-events").stderr
    assert "its tail was cut off" in own.storage("verify-events", "--heads", str(copy), code=FAILED).stderr
