from __future__ import annotations

import json
import re
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.stratus.conftest import Run
from tests.stratus.standin import (
    ATTACHMENT,
    INITIATOR,
    OPERATION,
    OTHER,
    PASSWORD,
    SNAPSHOT,
    VOLUME,
    Reply,
    StandIn,
    accepted,
    attachment,
    connection,
    operation,
    plan,
    problem,
    snapshot,
    volume,
)

V = f"/v1/volumes/{VOLUME}"
A = f"/v1/attachments/{ATTACHMENT}"


@pytest.mark.parametrize(
    ("written", "size"),
    [("10", 10 << 30), ("1.5", 3 << 29), ("512MiB", 512 << 20), ("2 TiB", 2 << 40), ("0.25GiB", 256 << 20)],
)
def test_a_size_is_gib_or_has_a_unit(service: StandIn, run: Run, written: str, size: int) -> None:
    service.on("POST", "/v1/volumes", Reply(201, volume(size=size)))
    assert run("create-volume", "-s", written, "-t", "results").exit_code == 0
    assert service.requests[0].body == {"name": "results", "size": size, "visibility": "private"}


@pytest.mark.parametrize("written", ["", "0", "-1", "10GB", "ten", "1e9", "0.1", "1..2", "٣", "9" * 30])
def test_what_is_no_size_is_a_usage_error(service: StandIn, run: Run, written: str) -> None:
    result = run("create-volume", "-s", written)
    assert result.exit_code == 2
    assert "--size" in result.stderr
    assert service.requests == []


def test_a_copy_has_its_source_and_needs_no_size(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", Reply(201, volume()))
    assert run("create-volume", "--snapshot", SNAPSHOT, "--public", "--pool", "fast").exit_code == 0
    assert service.requests[0].body == {"snapshot": SNAPSHOT, "visibility": "public", "pool": "fast"}
    assert run("create-volume", "--volume", VOLUME.upper()).exit_code == 0
    assert service.requests[1].body == {"volume": VOLUME, "visibility": "private"}


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("create-volume", [], "how large?"),
        ("create-volume", ["--snapshot", SNAPSHOT, "--volume", VOLUME], "not both"),
        ("create-volume", ["-s", "1", "--snapshot", "before"], "stratus-describe-snapshots"),
        ("update-volume", [VOLUME], "nothing to change"),
        ("delete-volume", [], "Missing argument"),
        ("delete-volume", ["results"], "stratus-describe-volumes"),
        ("describe-volumes", ["-f", "colour:red"], "tag, name, state"),
        ("describe-volumes", ["-f", "tag"], "':'"),
        ("describe-volumes", ["-f", "tag:("], "regular expression"),
        ("attach-volume", [VOLUME, "-i", "vm-1"], "an initiator is needed"),
        ("attach-volume", [VOLUME, "--initiator", "host7"], "initiatorname.iscsi"),
        ("attach-volume", [VOLUME, "--initiator", "iqn.x y"], "no initiator name"),
        ("share-volume", [VOLUME], "--group"),
        ("share-volume", [VOLUME, "--list", "--group", "g"], "--list goes alone"),
        ("share-volume", [VOLUME, "--remove", "--group", "g", "--mode", "ro"], "--remove takes no"),
        ("revert-volume", [VOLUME], "--snapshot"),
        ("describe-operations", ["--wait"], "--wait needs"),
        ("describe-attachments", ["--connection"], "give one ID"),
        ("describe-volumes", ["--timeout", "soon"], "no positive number"),
        ("describe-volumes", ["--token-file", "/nowhere"], "cannot read /nowhere"),
    ],
)
def test_usage_errors_say_what_to_write(service: StandIn, run: Run, name: str, arguments: list[str], said: str) -> None:
    result = run(name, *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert service.requests == []


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "malformed", 1),
        (401, "token-expired", 5),
        (403, "direct-attach-disabled", 5),
        (404, "not-found", 3),
        (409, "volume-in-use", 4),
        (412, "precondition-failed", 4),
        (422, "invalid", 1),
        (500, "internal", 1),
        (503, "target-unavailable", 7),
        (504, "slow", 6),
    ],
)
def test_exit_codes(service: StandIn, run: Run, status: int, code: str, exit_code: int) -> None:
    service.on("POST", "/v1/volumes", problem(status, code))
    result = run("create-volume", "-s", "1")
    assert result.exit_code == exit_code
    assert f"Error: Refused: it cannot be ({code})" in result.stderr
    assert result.stdout == ""


def test_no_service_is_unavailable(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = run("describe-volumes", "--endpoint", f"http://127.0.0.1:{port}")
    assert result.exit_code == 7
    assert "Connection refused" in result.stderr
    assert "is the service running" in result.stderr


def test_a_refusal_names_each_field_and_what_to_do(service: StandIn, run: Run) -> None:
    errors = [
        {"pointer": "/size", "name": None, "code": "too-small", "detail": "at least 1 MiB"},
        {"pointer": None, "name": "limit", "code": "x", "detail": "too many"},
    ]
    service.on("POST", "/v1/volumes", problem(409, "quota-exceeded", errors=errors))
    lines = run("create-volume", "-s", "1").stderr.splitlines()
    assert lines[1:3] == ["  size: at least 1 MiB", "  limit: too many"]
    assert lines[3].startswith("Hint: delete volumes or snapshots")


def test_data_and_messages_do_not_mix(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", Reply(201, volume()))
    result = run("create-volume", "-s", "10", "--format", "json")
    assert json.loads(result.stdout) == volume()
    assert result.stderr == "volume created\n"
    assert run("create-volume", "-s", "10", "--quiet").stderr == ""


def test_long_work_is_waited_for_and_its_record_shown(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", accepted())
    looks = [operation("running", 37), operation("succeeded", 100)]
    service.on("GET", f"/v1/operations/{OPERATION}", *(Reply(document=look) for look in looks))
    service.on("GET", V, Reply(document=volume()))
    result = run("create-volume", "--volume", OTHER, "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["id"] == VOLUME
    said = [line.partition("): ")[2] for line in result.stderr.splitlines()[:-1]]
    assert said == ["running, 0 %", "running, 30 %", "succeeded, 100 %"]


def test_not_waiting_shows_the_operation(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", accepted())
    result = run("create-volume", "--volume", OTHER, "--no-wait", "--format", "json")
    assert json.loads(result.stdout)["id"] == OPERATION
    assert service.requests[0].headers["Prefer"] == "wait=0"
    assert len(service.requests) == 1


def test_work_that_fails_later_fails_the_command(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", accepted())
    failed = operation("failed", error={"code": "pool-low-space", "detail": "no room in default"})
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=failed))
    result = run("create-volume", "--volume", OTHER, "-q")
    assert result.exit_code == 4
    assert "no room in default (pool-low-space)" in result.stderr
    assert "Hint: delete what" in result.stderr
    assert result.stdout == ""


def test_waiting_no_longer_than_asked(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", accepted())
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation()))
    result = run("create-volume", "--volume", OTHER, "--timeout", "0.3")
    assert result.exit_code == 6
    assert f"stratus-describe-operations --wait {OPERATION}" in result.stderr


def test_a_plan_changes_nothing(service: StandIn, run: Run) -> None:
    service.on("DELETE", V, Reply(document=plan()))
    result = run("delete-volume", VOLUME, "--dry-run")
    assert result.exit_code == 0
    assert "create the file" in result.stdout
    assert "nothing was changed" in result.stderr
    assert service.requests[0].query == {"dry_run": "true"}


def test_a_plan_with_a_conflict_is_one(service: StandIn, run: Run) -> None:
    refused = plan(("quota-exceeded", "10 GiB over"))
    service.on("POST", "/v1/volumes", Reply(document=refused))
    result = run("create-volume", "-s", "10", "--dry-run")
    assert result.exit_code == 4
    assert re.search(r"conflict +10 GiB over \(quota-exceeded\)", result.stdout)
    assert json.loads(run("create-volume", "-s", "10", "--dry-run", "--format", "json").stdout) == refused


def test_filters_narrow_the_list(service: StandIn, run: Run) -> None:
    items = [
        volume(id=VOLUME, name="run-1"),
        volume(id=OTHER, name=None, state="in-use", size=1 << 20),
        volume(id=SNAPSHOT, name="run-2", state="in-use"),
    ]
    service.on("GET", "/v1/volumes", Reply(document={"items": items, "next": None}))

    def ids(*filters: str) -> list[str]:
        arguments = [argument for each in filters for argument in ("-f", each)]
        found = json.loads(run("describe-volumes", *arguments, "--format", "json").stdout)
        return [record["id"] for record in found]

    assert ids() == [VOLUME, OTHER, SNAPSHOT]
    assert ids("tag:^run-") == [VOLUME, SNAPSHOT]
    assert ids("name:run", "state:^in-use$") == [SNAPSHOT]
    assert ids("size:^1048576$") == ids("size:^1MiB$") == [OTHER]
    assert ids("id:^2222") == [OTHER]
    assert ids("owner:^bob$") == []


def test_what_is_missing_does_not_hide_the_rest(service: StandIn, run: Run) -> None:
    service.on("GET", V, Reply(document=volume()))
    result = run("describe-volumes", OTHER, VOLUME, "--format", "json")
    assert result.exit_code == 3
    assert [record["id"] for record in json.loads(result.stdout)] == [VOLUME]
    assert OTHER in result.stderr


def test_deleting_goes_on_and_ends_with_the_worst(service: StandIn, run: Run) -> None:
    service.on("DELETE", V, problem(409, "volume-in-use"))
    service.on("DELETE", f"/v1/volumes/{SNAPSHOT}", Reply(204))
    result = run("delete-volume", VOLUME, OTHER, SNAPSHOT)
    assert result.exit_code == 4
    assert [request.path[-4:] for request in service.requests] == ["1111", "2222", "3333"]
    assert f"Error: {VOLUME}: Refused" in result.stderr
    assert f"volume {SNAPSHOT} deleted" in result.stderr
    assert result.stdout == ""


def test_a_long_deletion_ends_without_a_record(service: StandIn, run: Run) -> None:
    service.on("DELETE", f"/v1/snapshots/{SNAPSHOT}", accepted())
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation("succeeded")))
    result = run("delete-snapshot", SNAPSHOT)
    assert result.exit_code == 0
    assert f"snapshot {SNAPSHOT} deleted" in result.stderr


def test_updating_sends_only_what_is_given(service: StandIn, run: Run) -> None:
    service.on("PATCH", V, Reply(document=volume()))
    run("update-volume", VOLUME, "-t", "übung")
    run("update-volume", VOLUME, "--public")
    run("update-volume", VOLUME, "--private", "-s", "20")
    bodies = [request.body for request in service.requests]
    assert bodies == [{"name": "übung"}, {"visibility": "public"}, {"visibility": "private", "size": 20 << 30}]


def test_reverting_names_the_snapshot(service: StandIn, run: Run) -> None:
    service.on("POST", f"{V}/revert", Reply(document=volume()))
    assert run("revert-volume", VOLUME, "--snapshot", SNAPSHOT).exit_code == 0
    assert service.requests[0].body == {"snapshot": SNAPSHOT}


def test_sharing(service: StandIn, run: Run) -> None:
    shares = {"items": [{"group": "climate", "mode": "rw"}]}
    service.on("PUT", f"{V}/shares", Reply(document=shares))
    service.on("GET", f"{V}/shares", Reply(document=shares))
    service.on("DELETE", f"{V}/shares", Reply(204))
    assert "climate  rw" in run("share-volume", VOLUME, "--group", "climate", "--mode", "rw").stdout
    assert run("share-volume", VOLUME, "--list", "--format", "csv").stdout_bytes == b"group,mode\r\nclimate,rw\r\n"
    assert run("share-volume", VOLUME, "--group", "climate", "--remove").exit_code == 0
    assert [request.body for request in service.requests] == [{"group": "climate", "mode": "rw"}, None, None]
    assert service.requests[2].query == {"group": "climate"}


def test_snapshots(service: StandIn, run: Run) -> None:
    service.on("POST", f"{V}/snapshots", Reply(201, snapshot()))
    other = snapshot(id=OTHER, name="later")
    service.on("GET", "/v1/snapshots", Reply(document={"items": [snapshot(), other], "next": None}))
    assert SNAPSHOT in run("create-snapshot", VOLUME, "-t", "before").stdout
    run("create-snapshot", VOLUME)
    assert [request.body for request in service.requests] == [{"name": "before"}, {}]
    found = run("describe-snapshots", "--volume", VOLUME, "-f", "tag:^later$", "--format", "json").stdout
    assert [record["id"] for record in json.loads(found)] == [OTHER]
    assert service.requests[2].query["volume"] == VOLUME


def test_attaching_shows_the_secret_only_when_asked(service: StandIn, run: Run) -> None:
    service.on("POST", f"{V}/attachments", Reply(201, attachment(connection=connection())))
    arguments = ("attach-volume", VOLUME, "--initiator", INITIATOR)
    table = run(*arguments)
    assert "iqn.2026-01.test:v" in table.stdout
    assert "u-1" in table.stdout
    assert PASSWORD not in table.output
    assert PASSWORD not in run(*arguments, "--format", "csv").output
    assert PASSWORD in run(*arguments, "--show-secret").stdout
    assert json.loads(run(*arguments, "--format", "json").stdout)["connection"] == connection()
    body = {"instance_id": "direct", "node": socket.gethostname(), "initiator": INITIATOR}
    assert service.requests[0].body == {**body, "mode": "rw", "mutual_chap": False}


def test_attaching_says_who_where_and_how(service: StandIn, run: Run) -> None:
    service.on("POST", f"{V}/attachments", Reply(201, attachment(connection=connection())))
    options = ["--mode", "ro", "-i", "vm-1", "--node", "n1", "--mutual-chap"]
    run("attach-volume", VOLUME, "--initiator", INITIATOR, *options)
    body = {"instance_id": "vm-1", "node": "n1", "initiator": INITIATOR, "mode": "ro", "mutual_chap": True}
    assert service.requests[0].body == body


def test_a_connection_is_read_when_the_answer_holds_none(service: StandIn, run: Run) -> None:
    work: dict[str, Any] = {"resource": {"kind": "attachment", "id": ATTACHMENT}}
    service.on("POST", f"{V}/attachments", accepted(**work))
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation("succeeded", **work)))
    service.on("GET", A, Reply(document=attachment()))
    service.on("GET", f"{A}/connection", Reply(document=connection()))
    result = run("attach-volume", VOLUME, "--initiator", INITIATOR, "--format", "json")
    assert json.loads(result.stdout)["connection"] == connection()


def test_a_connection_file_is_for_its_owner_only(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("POST", f"{V}/attachments", Reply(201, attachment(connection=connection())))
    path = tmp_path / "volume.json"
    path.write_text("old")
    path.chmod(0o644)
    result = run("attach-volume", VOLUME, "--initiator", INITIATOR, "--connection-file", str(path))
    assert result.exit_code == 0
    assert json.loads(path.read_text()) == connection()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PASSWORD not in result.output


def test_a_refused_attachment_leaves_the_file_alone(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("POST", f"{V}/attachments", problem(409, "volume-in-use"))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "volume.json").write_text("old")
    file = ("--connection-file", str(folder / "volume.json"))
    assert run("attach-volume", VOLUME, "--initiator", INITIATOR, *file).exit_code == 4
    assert {each.name: each.read_text() for each in folder.iterdir()} == {"volume.json": "old"}


def test_a_file_that_cannot_be_written_stops_the_attachment(service: StandIn, run: Run, tmp_path: Path) -> None:
    file = ("--connection-file", str(tmp_path / "nowhere" / "volume.json"))
    result = run("attach-volume", VOLUME, "--initiator", INITIATOR, *file)
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert service.requests == []


def test_detaching_by_the_volume(service: StandIn, run: Run) -> None:
    held = [attachment(id=OTHER, state="detached"), attachment()]
    service.on("GET", V, Reply(document=volume(attachments=held)))
    service.on("DELETE", A, Reply(204))
    assert run("detach-volume", VOLUME, "--force").exit_code == 0
    assert [request.query for request in service.asked("DELETE", A)] == [{"force": "true"}]
    assert len(service.requests) == 2


def test_detaching_by_the_attachment(service: StandIn, run: Run) -> None:
    service.on("GET", A, Reply(document=attachment()))
    service.on("DELETE", A, Reply(204))
    assert run("detach-volume", ATTACHMENT).exit_code == 0
    assert service.asked("DELETE", A)[0].query == {}


def test_detaching_one_of_many_needs_a_choice(service: StandIn, run: Run) -> None:
    service.on("GET", V, Reply(document=volume(attachments=[attachment(), attachment(id=OTHER)])))
    service.on("DELETE", A, Reply(204))
    service.on("DELETE", f"/v1/attachments/{OTHER}", Reply(204))
    result = run("detach-volume", VOLUME)
    assert result.exit_code == 4
    assert ATTACHMENT in result.stderr
    assert "--all" in result.stderr
    assert len(service.requests) == 1
    assert run("detach-volume", VOLUME, "--all").exit_code == 0
    assert len(service.asked("DELETE", f"/v1/attachments/{OTHER}")) == 1


def test_detaching_what_is_not_attached_or_not_there(service: StandIn, run: Run) -> None:
    service.on("GET", V, Reply(document=volume()))
    assert run("detach-volume", VOLUME).exit_code == 4
    missing = run("detach-volume", OTHER)
    assert missing.exit_code == 3
    assert "no volume and no attachment" in missing.stderr
    service.on("GET", f"/v1/volumes/{SNAPSHOT}", problem(403, "forbidden"))
    assert run("detach-volume", SNAPSHOT).exit_code == 5


def test_attachments_are_listed_while_they_last(service: StandIn, run: Run) -> None:
    ended = attachment(id=OTHER, state="detached")
    service.on("GET", "/v1/attachments", Reply(document={"items": [attachment(), ended], "next": None}))
    service.on("GET", f"/v1/attachments/{OTHER}", Reply(document=ended))
    listed = run("describe-attachments", "--volume", VOLUME).stdout
    assert ATTACHMENT in listed
    assert OTHER not in listed
    assert "detached" in run("describe-attachments", OTHER).stdout


def test_a_connection_can_be_read_again(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("GET", A, Reply(document=attachment()))
    service.on("GET", f"{A}/connection", Reply(document=connection()))
    path = tmp_path / "again.json"
    result = run("describe-attachments", ATTACHMENT, "--connection", "--connection-file", str(path))
    assert "127.0.0.1:3260" in result.stdout
    assert PASSWORD not in result.output
    assert json.loads(path.read_text()) == connection()


def test_operations_are_listed_and_waited_for(service: StandIn, run: Run) -> None:
    ended = operation("failed", id=OTHER, error={"code": "x", "detail": "torn"})
    service.on("GET", "/v1/operations", Reply(document={"items": [operation("running", 41), ended], "next": None}))
    service.on(
        "GET", f"/v1/operations/{OPERATION}", Reply(document=operation()), Reply(document=operation("succeeded"))
    )
    service.on("GET", f"/v1/operations/{OTHER}", Reply(document=ended))
    assert "41 %" in run("describe-operations").stdout
    assert "torn" not in run("describe-operations").stdout
    assert "torn" in run("describe-operations", "--all").stdout
    waited = run("describe-operations", "--wait", OPERATION)
    assert waited.exit_code == 0
    assert "succeeded" in waited.stdout
    assert run("describe-operations", "--wait", OTHER).exit_code == 1


def test_plain_http_beyond_this_machine_is_warned_about(service: StandIn, run: Run) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [], "next": None}))
    by_no_loopback_address = service.url.replace("127.0.0.1", "0.0.0.0")
    result = run("describe-volumes", "-q", "--endpoint", by_no_loopback_address, no_proxy="*")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"Warning: {by_no_loopback_address} is not encrypted")
    assert run("describe-volumes").stderr == ""


def test_a_token_file_open_to_others_stops_the_command(service: StandIn, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("tok-2\n")
    path.chmod(0o644)
    result = run("describe-volumes", "--token-file", str(path))
    assert result.exit_code == 2
    assert f"Hint: chmod 600 {path}" in result.stderr
    path.chmod(0o600)
    service.on("GET", "/v1/volumes", Reply(document={"items": [], "next": None}))
    assert run("describe-volumes", "--token-file", str(path)).exit_code == 0
    assert service.requests[0].headers["Authorization"] == "Bearer tok-2"
