"""Every change is an event that says who, from where, and on what; and the chain of events shows every tampering."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.db import Database
from app.events import digest, sign_head
from app.keys import Signer
from app.models import Event
from tests.api.support import MIB, initiator, query
from tests.support.service import BIN, Api, RunningService, running, wait_until

SETTINGS = {"STRATUS_WORKER__HEAD_INTERVAL": "0.2"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("audit") / "home", SETTINGS) as started:
        yield started


class Trail:
    """Does things, and tells which events came of each."""

    def __init__(self, service: RunningService) -> None:
        self._service = service

    def of(self, act: Callable[[], Any]) -> tuple[list[sqlite3.Row], Any]:
        before = {row["id"] for row in query(self._service, "SELECT id FROM events")}
        answer = act()
        rows = query(self._service, "SELECT * FROM events ORDER BY id")
        return [row for row in rows if row["id"] not in before and not row["kind"].startswith("pool.")], answer


def life(service: RunningService, alice: Api) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Every mutation once: who, what, and the event it must be."""
    admin, ids = service.admin, {}

    def make(path: str, body: Any, key: str = "id") -> Callable[[], Any]:
        def act() -> Any:
            answer = alice.post(path, json=body)
            ids["last"] = answer.json()[key]
            return answer

        return act

    yield "alice", make("/v1/volumes", {"size": MIB, "name": "v"}), "volume.create"
    volume = f"/v1/volumes/{ids['last']}"
    yield "alice", lambda: alice.patch(volume, json={"name": "w"}), "volume.update"
    yield "alice", lambda: alice.patch(volume, json={"size": 2 * MIB}), "volume.grow"
    yield "admin", lambda: admin.post("/v1/groups", json={"name": "g"}), "group.create"
    yield "admin", lambda: admin.put("/v1/groups/g", json={"members": ["alice"]}), "group.update"
    yield "alice", lambda: alice.put(volume + "/shares", json={"group": "g"}), "volume.share"
    yield "alice", lambda: alice.delete(volume + "/shares?group=g"), "volume.unshare"
    yield "admin", lambda: admin.delete("/v1/groups/g"), "group.delete"
    yield "alice", make(volume + "/snapshots", {"name": "s"}), "snapshot.create"
    snapshot = ids["last"]
    yield "alice", lambda: alice.post(volume + "/revert", json={"snapshot": snapshot}), "volume.revert"
    yield "alice", make("/v1/volumes", {"snapshot": snapshot}), "volume.create"
    clone = ids["last"]
    yield "alice", lambda: alice.delete(f"/v1/volumes/{clone}"), "volume.delete"
    yield "alice", lambda: alice.delete(f"/v1/snapshots/{snapshot}"), "snapshot.delete"
    yield (
        "alice",
        make(volume + "/attachments", {"instance_id": "i", "node": "n", "initiator": initiator("a")}),
        "attachment.attach",
    )
    attachment = f"/v1/attachments/{ids['last']}"
    yield "alice", lambda: alice.get(attachment + "/connection"), "attachment.connection-read"
    yield "admin", lambda: admin.delete(attachment + "?force=true"), "attachment.detach"
    yield "admin", lambda: admin.post(volume + "/reset-state", json={}), "volume.reset-state"
    yield "alice", lambda: alice.delete(volume), "volume.delete"
    yield "alice", make("/v1/tokens", {}), "token.create"
    token = ids["last"]
    yield "alice", lambda: alice.delete(f"/v1/tokens/{token}"), "token.revoke"
    yield "alice", lambda: alice.patch("/v1/users/alice", json={"password": "correct horse battery"}), "user.update"
    yield "admin", lambda: admin.put("/v1/quotas/alice", json={"count": 5}), "quota.update"
    yield "admin", lambda: admin.post("/v1/users", json={"name": "u"}), "user.create"
    yield "admin", lambda: admin.delete("/v1/users/u"), "user.delete"
    yield "admin", lambda: admin.post("/v1/nodes", json={"name": "n", "initiator": initiator("n")}), "user.create"
    yield "admin", lambda: admin.patch("/v1/nodes/n", json={"enabled": False}), "node.update"
    yield "admin", lambda: admin.delete("/v1/nodes/n"), "user.delete"


def test_every_change_is_an_event(service: RunningService) -> None:
    trail, alice = Trail(service), service.user("alice")
    for who, act, kind in life(service, alice):
        found, answer = trail.of(act)
        assert answer.status_code < 300, answer.text
        intended = [event for event in found if event["kind"] == kind]
        assert len(intended) == 1, (kind, [event["kind"] for event in found])
        assert {event["actor"] for event in found} == {who}, kind
        assert {event["address"] for event in found} == {"127.0.0.1"}, kind
        assert all(event["resource_kind"] and event["resource_id"] for event in found), kind


def test_what_was_refused_is_no_event(service: RunningService) -> None:
    found, answer = Trail(service).of(lambda: service.admin.post("/v1/volumes", json={"size": 1}))
    assert answer.status_code == 422
    assert found == []


def test_an_admin_reads_the_trail(service: RunningService) -> None:
    volume = service.admin.make_volume(MIB)["id"]
    service.admin.patch(f"/v1/volumes/{volume}", json={"name": "x"})
    found = service.admin.get("/v1/events", params={"resource": volume}).json()["items"]
    assert [event["kind"] for event in found] == ["volume.update", "volume.created", "volume.create"]
    assert {event["resource"]["id"] for event in found} == {volume}
    only = service.admin.get("/v1/events", params={"kind": "volume.update", "limit": "1"}).json()["items"]
    assert [event["id"] for event in only] == [found[0]["id"]]
    wait_until(lambda: _sealed(service, volume), what="the seal")


def _sealed(service: RunningService, resource: str) -> bool:
    found = service.admin.get("/v1/events", params={"resource": resource}).json()["items"]
    return all(event["sequence"] and event["hash"] for event in found)


# ---------------------------------------------------------------- the chain


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a service that did some things and was stopped in order."""
    home = tmp_path_factory.mktemp("closed") / "home"
    with running(home, SETTINGS) as service:
        for number in range(5):
            service.admin.post("/v1/groups", json={"name": f"g{number}"})
        heads = home / "log" / "event-heads.jsonl"
        wait_until(lambda: heads.exists() and heads.read_text(), what="a signed head")
        for number in range(5):
            service.admin.delete(f"/v1/groups/g{number}")
        assert service.stop() == 0
    return home


@pytest.fixture
def home(closed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(closed, tmp_path / "home", ignore=shutil.ignore_patterns("run", "pool")))


def verify(home: Path, *arguments: str) -> tuple[int, str]:
    argv = [str(BIN / "stratus-storage"), "verify-events", "--home", str(home), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def alter(home: Path, *statements: str) -> None:
    with closing(sqlite3.connect(home / "stratus.db")) as database:
        for statement in statements:
            assert database.execute(statement).rowcount > 0, statement
        database.commit()


def test_an_untouched_chain_holds(home: Path) -> None:
    code, told = verify(home)
    assert code == 0, told
    assert "0 not sealed yet" in told
    assert verify(home, "--pubkey", (home / "keys" / "events.pub").read_text().strip())[0] == 0


TAMPERING = {
    "another actor": ["UPDATE events SET actor = 'mallory' WHERE sequence = 4"],
    "another address": ["UPDATE events SET address = '192.0.2.1' WHERE sequence = 4"],
    "another kind": ["UPDATE events SET kind = 'group.creatf' WHERE sequence = 4"],
    "another time": ["UPDATE events SET at = datetime(at, '+1 second') WHERE sequence = 4"],
    "another resource": ["UPDATE events SET resource_id = (SELECT id FROM users LIMIT 1) WHERE sequence = 4"],
    "another detail": ["""UPDATE events SET detail = '{"name": "other"}' WHERE sequence = 4"""],
    "another hash": ["UPDATE events SET hash = (SELECT hash FROM events WHERE sequence = 3) WHERE sequence = 4"],
    "one deleted": ["DELETE FROM events WHERE sequence = 4"],
    "one deleted, gap closed": [
        "DELETE FROM events WHERE sequence = 4",
        "UPDATE events SET sequence = -sequence WHERE sequence > 4",
        "UPDATE events SET sequence = -sequence - 1 WHERE sequence < 0",
    ],
    "two swapped": [
        "UPDATE events SET sequence = -4 WHERE sequence = 4",
        "UPDATE events SET sequence = 4 WHERE sequence = 5",
        "UPDATE events SET sequence = 5 WHERE sequence = -4",
    ],
    "the first deleted": ["DELETE FROM events WHERE sequence = 1"],
    "the tail cut off": ["DELETE FROM events WHERE sequence > 6"],
    "the last cut off": ["DELETE FROM events WHERE sequence = (SELECT max(sequence) FROM events)"],
    "all deleted": ["DELETE FROM events"],
    "taken out of the chain": ["UPDATE events SET sequence = NULL, hash = NULL WHERE sequence > 6"],
}  # fmt: skip


@pytest.mark.parametrize("statements", TAMPERING.values(), ids=TAMPERING)
def test_tampering_shows(home: Path, statements: list[str]) -> None:
    alter(home, *statements)
    code, told = verify(home)
    assert code == 1, told
    assert "BROKEN" in told


def test_a_chain_made_anew_is_not_the_one_that_was_signed(home: Path) -> None:
    """Who can compute hashes but has no key: every link fits, and the signed heads tell."""
    alter(home, "UPDATE events SET actor = 'mallory' WHERE sequence = 2")
    _chain_anew(home)
    code, told = verify(home)
    assert code == 1
    assert "signed" in told


def _chain_anew(home: Path) -> None:
    from sqlalchemy import select

    database = Database(f"sqlite:///{home}/stratus.db")
    with database.write() as session:
        previous = "0" * 64
        for event in session.scalars(select(Event).order_by(Event.sequence)):
            event.previous = previous
            event.hash = previous = digest(event, event.sequence or 0, previous)
    database.close()


def test_heads_signed_by_another_key_do_not_count(home: Path, tmp_path: Path) -> None:
    """Who can write database and heads makes both anew, and signs with a key of their own."""
    heads = home / "log" / "event-heads.jsonl"
    alter(home, "UPDATE events SET actor = 'mallory' WHERE sequence = 2")
    _chain_anew(home)
    heads.unlink()
    other = Signer.load_or_create(tmp_path / "other.key")
    database = Database(f"sqlite:///{home}/stratus.db")
    assert sign_head(database, other, heads)
    database.close()
    code, told = verify(home)
    assert code == 1
    assert "the signature in line 1 " in told
    assert verify(home, "--pubkey", other.public)[0] == 0


def test_a_changed_head_does_not_count(home: Path) -> None:
    heads = home / "log" / "event-heads.jsonl"
    lines = [json.loads(line) for line in heads.read_text().splitlines()]
    lines[-1]["hash"] = "0" * 64
    heads.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, told = verify(home)
    assert code == 1
    assert f"the signature in line {len(lines)} " in told


def test_a_copy_of_the_heads_tells_of_a_tail_that_both_lost(home: Path, tmp_path: Path) -> None:
    heads, copy = home / "log" / "event-heads.jsonl", tmp_path / "copy.jsonl"
    shutil.copy(heads, copy)
    alter(home, "DELETE FROM events WHERE sequence > 1")
    heads.unlink()
    code, told = verify(home)
    assert code == 0
    assert "the tail is not protected" in told
    code, told = verify(home, "--heads", str(copy))
    assert code == 1
    assert "its tail was cut off" in told
