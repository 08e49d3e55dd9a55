"""Signing in, and the accounts, tokens and passwords it stands on."""

from __future__ import annotations

import base64
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from uuid import UUID

import pytest
import requests

from tests.api.support import MIB, initiator, problem, unchanged
from tests.support.service import Api, RunningService

PASSWORD = "correct horse battery"
OTHER = "another password that is long"


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def whoami(service: RunningService, authorization: str | None) -> requests.Response:
    headers = {} if authorization is None else {"Authorization": authorization}
    return requests.get(service.base + "/v1/whoami", headers=headers, timeout=60)


def refused(service: RunningService, authorization: str | None, code: str) -> None:
    """By a reading and by a change alike; and it says how to sign in (RFC 9110 §11.6.1)."""
    problem(whoami(service, authorization), 401, code)
    headers = {} if authorization is None else {"Authorization": authorization}
    with unchanged(service):
        answer = requests.post(service.base + "/v1/volumes", json={"size": MIB}, headers=headers, timeout=60)
    problem(answer, 401, code)
    assert {part.split()[0] for part in answer.headers["WWW-Authenticate"].split(", ") if " " in part} == {
        "Bearer",
        "Basic",
    }


@pytest.fixture(scope="module")
def alice(service: RunningService) -> Api:
    assert service.admin.post("/v1/users", json={"name": "alice", "password": PASSWORD}).status_code == 201
    return service._with_token("alice")


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "not-signed-in"),
        ("", "not-signed-in"),
        ("Bearer", "token-invalid"),
        ("Bearer wrong", "token-invalid"),
        ("Bearer stratus_" + "x" * 43, "token-invalid"),
        ("Bearer \xfc\xff", "token-invalid"),
        ("Digest username=alice", "not-signed-in"),
        ("Basic ???", "not-signed-in"),
        ("Basic /////w==", "not-signed-in"),
        (basic("alice", "wrong password"), "password-invalid"),
        (basic("alice", ""), "password-invalid"),
        (basic("alice\0", PASSWORD), "password-invalid"),
        (basic("nobody", PASSWORD), "password-invalid"),
        (basic("admin", ""), "password-invalid"),
    ],
)
def test_who_is_not_signed_in(service: RunningService, alice: Api, authorization: str | None, code: str) -> None:
    refused(service, authorization.encode("latin-1") if authorization else authorization, code)  # type: ignore[arg-type]


def test_a_name_that_is_not_there_looks_like_a_wrong_password(service: RunningService, alice: Api) -> None:
    known, unknown = (whoami(service, basic(name, "wrong password")) for name in ("alice", "nobody"))
    assert known.text == unknown.text


def test_with_a_password_and_with_a_token(service: RunningService, alice: Api) -> None:
    for authorization in (basic("alice", PASSWORD), str(alice.headers["Authorization"])):
        assert whoami(service, authorization).json()["name"] == "alice"


# ---------------------------------------------------------------- tokens


def test_a_revoked_token(service: RunningService, alice: Api) -> None:
    token = alice.post("/v1/tokens", json={"description": "lost"}).json()
    assert whoami(service, f"Bearer {token['token']}").status_code == 200
    assert alice.delete(f"/v1/tokens/{token['id']}").status_code == 204
    refused(service, f"Bearer {token['token']}", "token-revoked")
    problem(alice.delete(f"/v1/tokens/{token['id']}"), 404, "token-not-found")
    listed = {item["id"]: item for item in alice.get("/v1/tokens").json()["items"]}
    assert listed[token["id"]]["revoked_at"]


def test_an_expired_token(service: RunningService, alice: Api) -> None:
    token = alice.post("/v1/tokens", json={"expires_in": 3600}).json()
    assert whoami(service, f"Bearer {token['token']}").status_code == 200
    with closing(sqlite3.connect(service.home / "stratus.db", timeout=15)) as database, database:
        hour = "UPDATE tokens SET expires_at = datetime(expires_at, '-3601 seconds') WHERE id = ?"
        assert database.execute(hour, (UUID(token["id"]).hex,)).rowcount == 1
    refused(service, f"Bearer {token['token']}", "token-expired")


def test_tokens_of_others(service: RunningService, alice: Api) -> None:
    bob = service.user("bob")
    theirs = bob.get("/v1/tokens").json()["items"][0]
    assert {item["user"] for item in alice.get("/v1/tokens").json()["items"]} == {"alice"}
    with unchanged(service):
        problem(alice.delete(f"/v1/tokens/{theirs['id']}"), 404, "token-not-found")
        problem(alice.post("/v1/tokens", json={"user": "bob"}), 404, "user-not-found")
    assert service.admin.delete(f"/v1/tokens/{theirs['id']}").status_code == 204
    assert bob.get("/v1/whoami").status_code == 401


# ---------------------------------------------------------------- passwords


def test_users_change_their_own_password(service: RunningService, alice: Api) -> None:
    service.admin.post("/v1/users", json={"name": "forgetful", "password": PASSWORD})
    forgetful = service._with_token("forgetful")
    assert forgetful.patch("/v1/users/forgetful", json={"password": OTHER}).status_code == 200
    refused(service, basic("forgetful", PASSWORD), "password-invalid")
    assert whoami(service, basic("forgetful", OTHER)).status_code == 200
    with unchanged(service):
        problem(forgetful.patch("/v1/users/alice", json={"password": OTHER}), 404, "user-not-found")
        problem(forgetful.patch("/v1/users/forgetful", json={"enabled": True}), 403, "admin-only")
        problem(
            forgetful.patch("/v1/users/forgetful", json={"password": PASSWORD, "enabled": False}), 403, "admin-only"
        )


def test_no_answer_and_no_row_has_a_password(service: RunningService, alice: Api) -> None:
    assert "password" not in service.admin.get("/v1/users").text
    for file in [*service.home.glob("stratus.db*"), *(service.home / "log").iterdir()]:
        assert PASSWORD.encode() not in file.read_bytes(), file


# ---------------------------------------------------------------- accounts


def test_a_disabled_account(service: RunningService) -> None:
    service.admin.post("/v1/users", json={"name": "away", "password": PASSWORD})
    token = str(service._with_token("away").headers["Authorization"])
    assert service.admin.patch("/v1/users/away", json={"enabled": False}).json()["enabled"] is False
    refused(service, token, "account-disabled")
    refused(service, basic("away", PASSWORD), "account-disabled")
    refused(service, basic("away", "wrong password"), "password-invalid")
    service.admin.patch("/v1/users/away", json={"enabled": True})
    assert whoami(service, token).status_code == whoami(service, basic("away", PASSWORD)).status_code == 200


def test_a_disabled_node(service: RunningService) -> None:
    node = service.node("node-1", initiator("disabled"))
    service.admin.patch("/v1/nodes/node-1", json={"enabled": False})
    problem(node.get("/v1/volumes"), 401, "account-disabled")


def test_a_node_that_moves_to_another_initiator(service: RunningService, alice: Api) -> None:
    node = service.node("node-2", initiator("before"))
    volume = alice.make_volume(MIB)["id"]
    body = {"instance_id": "i", "node": "node-2", "initiator": initiator("after")}
    problem(node.post(f"/v1/volumes/{volume}/attachments", json=body), 403, "not-this-node")
    changed = service.admin.patch("/v1/nodes/node-2", json={"initiator": initiator("AFTER")})
    assert changed.json()["initiator"] == initiator("after")
    assert node.post(f"/v1/volumes/{volume}/attachments", json=body).status_code == 201
    problem(service.admin.delete("/v1/nodes/node-2"), 409, "user-in-use")


def test_a_deleted_user_is_gone(service: RunningService) -> None:
    gone = service.user("gone")
    assert service.admin.delete("/v1/users/gone").status_code == 204
    problem(gone.get("/v1/whoami"), 401, "token-invalid")
    problem(service.admin.get("/v1/users/gone"), 404, "user-not-found")


def test_who_has_something_is_not_deleted(service: RunningService) -> None:
    keeper = service.user("keeper")
    volume = keeper.make_volume(MIB)["id"]
    with unchanged(service):
        problem(service.admin.delete("/v1/users/keeper"), 409, "user-in-use")
    keeper.delete(f"/v1/volumes/{volume}")
    assert service.admin.delete("/v1/users/keeper").status_code == 204


def test_the_last_admin_stays(service: RunningService) -> None:
    with unchanged(service):
        problem(service.admin.delete("/v1/users/admin"), 409, "last-admin")
        problem(service.admin.patch("/v1/users/admin", json={"enabled": False}), 409, "last-admin")


def test_admins_that_disable_one_another_at_once(service: RunningService) -> None:
    """One is left, however many try."""
    names = [f"admin-{number}" for number in range(8)]
    for name in names:
        service.admin.post("/v1/users", json={"name": name, "role": "admin"})
    apis = [service._with_token(name) for name in names]
    victims = ["admin", *names[1:], names[0]]
    with ThreadPoolExecutor(len(victims)) as pool:
        list(pool.map(lambda pair: pair[0].patch(f"/v1/users/{pair[1]}", json={"enabled": False}),
                      zip([*apis, apis[0]], victims, strict=True)))  # fmt: skip
    with closing(sqlite3.connect(service.home / "stratus.db", timeout=15)) as database, database:
        left = database.execute("SELECT count(*) FROM users WHERE role = 'admin' AND enabled").fetchone()[0]
        database.execute("UPDATE users SET enabled = 1 WHERE name = 'admin'")
    assert left >= 1
    for name in names:
        service.admin.delete(f"/v1/users/{name}")
