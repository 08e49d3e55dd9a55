"""A repeated request is answered again and does nothing; and no secret is kept for it."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
import requests

from tests.api.support import MIB, events, initiator, problem, query, unchanged
from tests.support.service import Api, RunningService, wait_until

TOGETHER = 20


@pytest.fixture(scope="module")
def alice(service: RunningService) -> Api:
    return service.user("alice")


def key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid4())}


def test_a_repeated_creation_gives_the_same_volume(service: RunningService, alice: Api) -> None:
    headers = key()
    first = alice.post("/v1/volumes", json={"size": MIB, "name": "once"}, headers=headers)
    with unchanged(service):
        again = alice.post("/v1/volumes", json={"size": MIB, "name": "once"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    for name in ("Location", "ETag"):
        assert first.headers[name] == again.headers[name]
    assert len(alice.get("/v1/volumes?name=once").json()["items"]) == 1


def test_a_repetition_tells_the_volume_as_it_is_now(alice: Api) -> None:
    headers = key()
    volume = alice.post("/v1/volumes", json={"size": MIB}, headers=headers).json()["id"]
    alice.patch(f"/v1/volumes/{volume}", json={"name": "renamed"})
    assert alice.post("/v1/volumes", json={"size": MIB}, headers=headers).json()["name"] == "renamed"


def test_a_repetition_after_the_volume_is_gone(service: RunningService, alice: Api) -> None:
    """It is not made once more."""
    headers = key()
    volume = alice.post("/v1/volumes", json={"size": MIB}, headers=headers).json()["id"]
    assert alice.delete(f"/v1/volumes/{volume}").status_code == 204
    with unchanged(service):
        problem(alice.post("/v1/volumes", json={"size": MIB}, headers=headers), 404, "volume-not-found")


def test_many_at_once_make_one(alice: Api) -> None:
    headers = key()
    body: dict[str, Any] = {"size": MIB, "name": "together"}

    def create(_: int) -> requests.Response:
        return alice.post("/v1/volumes", json=body, headers=headers)

    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(create, range(TOGETHER)))
    for answer in answers:
        assert answer.status_code == 201 or problem(answer, 409, "idempotency-in-flight")
        assert answer.status_code == 201 or int(answer.headers["Retry-After"]) > 0
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert made == {volume["id"] for volume in alice.get("/v1/volumes?name=together").json()["items"]}
    assert len(made) == 1


def test_many_at_once_without_an_operation_make_one(service: RunningService) -> None:
    headers = key()
    with ThreadPoolExecutor(TOGETHER) as pool:
        send = lambda _: service.admin.post("/v1/groups", json={"name": "twenty"}, headers=headers)  # noqa: E731
        answers = list(pool.map(send, range(TOGETHER)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert {answer.headers["Location"] for answer in answers} == {"/v1/groups/twenty"}
    created = query(service, "SELECT * FROM events WHERE kind = 'group.create' AND detail LIKE '%twenty%'")
    assert len(created) == 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/volumes", {"size": 2 * MIB}),
        ("POST", "/v1/volumes", {"size": MIB, "name": None}),
        ("POST", "/v1/tokens", {}),
        ("POST", "/v1/tokens", {"size": MIB}),
    ],
)
def test_another_request_under_the_same_key(
    service: RunningService, alice: Api, method: str, path: str, body: dict[str, Any]
) -> None:
    headers = key()
    assert alice.post("/v1/volumes", json={"size": MIB}, headers=headers).status_code == 201
    with unchanged(service):
        code = "invalid-request" if path == "/v1/tokens" and body else "idempotency-key-reused"
        problem(alice.request(method, path, json=body, headers=headers), 422, code)


def test_what_was_refused_can_be_tried_again_under_its_key(service: RunningService, alice: Api) -> None:
    headers = key()
    problem(alice.post("/v1/volumes", json={"size": MIB, "pool": "none"}, headers=headers), 404, "pool-not-found")
    assert query(service, "SELECT * FROM idempotency_keys WHERE key = ?", headers["Idempotency-Key"]) == []
    assert alice.post("/v1/volumes", json={"size": MIB}, headers=headers).status_code == 201


def test_a_plan_uses_up_no_key(alice: Api) -> None:
    headers = key()
    assert alice.post("/v1/volumes?dry_run=true", json={"size": MIB}, headers=headers).json()["dry_run"] is True
    assert alice.post("/v1/volumes", json={"size": MIB}, headers=headers).status_code == 201


def test_keys_belong_to_their_principal(service: RunningService, alice: Api) -> None:
    headers, bob = key(), service.user("bob")
    hers = alice.post("/v1/volumes", json={"size": MIB}, headers=headers).json()
    his = bob.post("/v1/volumes", json={"size": 3 * MIB}, headers=headers)
    assert his.status_code == 201
    assert (his.json()["owner"], hers["owner"]) == ("bob", "alice")


def test_one_in_flight(service: RunningService, alice: Api) -> None:
    """While the first is worked on, the second is told to wait; when it is done, it is told what came of it."""
    headers = key()
    worker = service.worker_pid()
    service.kill(worker, signal.SIGSTOP)
    try:
        first = alice.post("/v1/volumes", json={"size": MIB}, headers={**headers, "Prefer": "wait=0"})
        assert first.status_code == 202
        assert first.headers["Location"] == f"/v1/operations/{first.json()['id']}"
        second = alice.post("/v1/volumes", json={"size": MIB}, headers=headers)
        problem(second, 409, "idempotency-in-flight")
        assert second.headers["Retry-After"] == "1"
    finally:
        with suppress(ProcessLookupError):  # the supervisor may have replaced it by now
            service.kill(worker, signal.SIGCONT)
    ended = wait_until(lambda: alice.get(first.headers["Location"] + "?wait=10").json(), what="the operation")
    assert ended["state"] == "succeeded"
    again = alice.post("/v1/volumes", json={"size": MIB}, headers=headers)
    assert (again.status_code, again.json()["id"]) == (201, ended["resource"]["id"])


# ---------------------------------------------------------------- secrets


def test_a_token_is_shown_once(service: RunningService, alice: Api) -> None:
    headers = key()
    first = alice.post("/v1/tokens", json={"description": "ci"}, headers=headers).json()
    with unchanged(service):
        again = alice.post("/v1/tokens", json={"description": "ci"}, headers=headers)
    assert again.status_code == 201
    assert again.json() == first | {"token": None}
    assert first["token"] not in _everything(service)


def test_a_connection_is_told_again_and_that_is_an_event(service: RunningService, alice: Api) -> None:
    headers, body = key(), {"instance_id": "i", "node": "n", "initiator": initiator("again"), "mode": "rw"}
    volume = alice.make_volume(MIB)["id"]
    path = f"/v1/volumes/{volume}/attachments"
    first = alice.post(path, json=body, headers=headers).json()
    assert _readings(service, first["id"]) == 0
    again = alice.post(path, json=body, headers=headers)
    assert (again.status_code, again.json()) == (201, first)
    assert again.headers["Cache-Control"] == "no-store"
    assert _readings(service, first["id"]) == 1
    assert first["connection"]["auth"]["password"] not in _everything(service)
    alice.detach(first["id"])
    problem(alice.post(path, json=body, headers=headers), 409, "attachment-ended")
    assert _readings(service, first["id"]) == 1


def _readings(service: RunningService, attachment: str) -> int:
    return [event["kind"] for event in events(service, attachment)].count("attachment.connection-read")


def _everything(service: RunningService) -> str:
    """All the service has written down: database, its log of writes, logs."""
    files = [*service.home.glob("stratus.db*"), *(service.home / "log").iterdir()]
    return "".join(file.read_bytes().decode("latin-1") for file in files)


# ---------------------------------------------------------------- changes and deletions


def test_repeated_changes(service: RunningService, alice: Api) -> None:
    headers = key()
    volume = alice.make_volume(MIB)["id"]
    first = alice.patch(f"/v1/volumes/{volume}", json={"name": "a"}, headers=headers)
    alice.patch(f"/v1/volumes/{volume}", json={"name": "b"})
    with unchanged(service):
        again = alice.patch(f"/v1/volumes/{volume}", json={"name": "a"}, headers=headers)
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["ETag"] == first.headers["ETag"]
    assert alice.get(f"/v1/volumes/{volume}").json()["name"] == "b"


def test_repeated_deletions(service: RunningService, alice: Api) -> None:
    """A client whose connection broke learns that it is done, and not that there is nothing."""
    volume = alice.make_volume(MIB)["id"]
    snapshot = alice.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    attached = alice.attach(volume, initiator("gone"))["id"]
    token = alice.post("/v1/tokens", json={}).json()["id"]
    for path in (f"attachments/{attached}", f"snapshots/{snapshot}", f"volumes/{volume}", f"tokens/{token}"):
        headers = key()
        assert alice.delete(f"/v1/{path}", headers=headers).status_code == 204
        with unchanged(service):
            assert alice.delete(f"/v1/{path}", headers=headers).status_code == 204


def test_a_failure_is_told_again(alice: Api) -> None:
    """Larger than any file of the file system: what failed once under a key has failed."""
    headers, body = key(), {"size": 63 << 40}
    answers = [alice.post("/v1/volumes", json=body, headers=headers) for _ in range(2)]
    codes = {answer.json()["code"] for answer in answers}
    assert codes <= {"pool-overcommitted", "quota-exceeded", "size-too-large"}
    assert {answer.status_code for answer in answers} == {409}
