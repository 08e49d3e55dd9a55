"""`?dry_run=true`: every mutation tells what it would do, what stands against it, and does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.api.support import MIB, NOWHERE, initiator, problem, query, unchanged
from tests.support.service import Api, RunningService


@dataclass
class Site:
    service: RunningService
    admin: Api
    alice: Api
    bob: Api
    names: dict[str, str]

    def plan(self, who: str, method: str, path: str, body: Any = None) -> requests.Response:
        api: Api = getattr(self, who)
        path = path.format(**self.names)
        filled = {k: v.format(**self.names) if isinstance(v, str) else v for k, v in body.items()} if body else body
        with unchanged(self.service):
            return api.request(method, path, params={"dry_run": "true"}, json=filled)


@pytest.fixture(scope="module")
def site(service: RunningService) -> Site:
    admin, alice, bob = service.admin, service.user("alice"), service.user("bob")
    service.node("node-1", initiator("node-1"))
    admin.post("/v1/groups", json={"name": "friends"})
    admin.put("/v1/groups/friends", json={"members": ["alice"]})
    free, used = alice.make_volume(2 * MIB)["id"], alice.make_volume(MIB)["id"]
    alice.put(f"/v1/volumes/{free}/shares", json={"group": "friends"})
    names = {
        "free": free,
        "used": used,
        "snapshot": alice.post(f"/v1/volumes/{free}/snapshots", json={}).json()["id"],
        "attachment": alice.attach(used, initiator("alice"))["id"],
        "token": alice.post("/v1/tokens", json={}).json()["id"],
    }
    sent = {"size": MIB, "checksum": "0" * 64, "format": "raw"}
    names["sent"] = alice.post("/v1/images", json={"upload": sent}).json()["id"]
    kept = alice.post("/v1/images", json={"volume": free}, headers={"Prefer": "wait=30"})
    assert kept.status_code == 201, kept.text
    names["kept"] = kept.json()["id"]
    assert admin.put(f"/v1/images/{names['kept']}/pins/vm-1").status_code == 200
    names["operation"] = query(service, "SELECT id FROM operations WHERE kind = 'snapshot.create'")[0]["id"]
    return Site(service, admin, alice, bob, names)


ATTACH = {"instance_id": "i", "node": "n", "initiator": initiator("other")}
NODES = ATTACH | {"initiator": initiator("node-1")}
#: Who, operation, body: all of them would succeed.
WOULD = [
    ("alice", "POST", "/v1/volumes", {"size": MIB}),
    ("alice", "POST", "/v1/volumes", {"volume": "{free}"}),
    ("alice", "POST", "/v1/volumes", {"snapshot": "{snapshot}", "size": 4 * MIB}),
    ("alice", "PATCH", "/v1/volumes/{free}", {"name": "x", "visibility": "public"}),
    ("alice", "PATCH", "/v1/volumes/{used}", {"size": 4 * MIB}),
    ("alice", "DELETE", "/v1/volumes/{free}", None),
    ("alice", "POST", "/v1/volumes/{free}/attachments", ATTACH),
    ("alice", "POST", "/v1/volumes/{free}/snapshots", {"name": "x"}),
    ("alice", "POST", "/v1/volumes/{free}/revert", {"snapshot": "{snapshot}"}),
    ("admin", "POST", "/v1/volumes/{free}/reset-state", {}),
    ("alice", "PUT", "/v1/volumes/{free}/shares", {"group": "friends", "mode": "rw"}),
    ("alice", "DELETE", "/v1/volumes/{free}/shares?group=friends", None),
    ("alice", "DELETE", "/v1/snapshots/{snapshot}", None),
    ("alice", "DELETE", "/v1/attachments/{attachment}", None),
    ("admin", "DELETE", "/v1/attachments/{attachment}?force=true", None),
    ("alice", "POST", "/v1/operations/{operation}/cancel", {}),
    ("alice", "POST", "/v1/images", {"reference": "BEE8-MMAw-Lk_IgsEExAy3d9R8h"}),
    ("alice", "POST", "/v1/images", {"snapshot": "{snapshot}"}),
    ("alice", "POST", "/v1/volumes", {"image": "{kept}"}),
    ("alice", "POST", "/v1/judgements", {"reference": "BEE8-MMAw-Lk_IgsEExAy3d9R8h"}),
    ("alice", "PATCH", "/v1/images/{sent}", {"name": "x"}),
    ("alice", "DELETE", "/v1/images/{sent}", None),
    ("admin", "PUT", "/v1/images/{kept}/pins/vm-2", None),
    ("admin", "DELETE", "/v1/images/{kept}/pins/vm-1", None),
    ("alice", "POST", "/v1/tokens", {"description": "x"}),
    ("alice", "DELETE", "/v1/tokens/{token}", None),
    ("alice", "PATCH", "/v1/users/alice", {"password": "correct horse battery"}),
    ("admin", "POST", "/v1/users", {"name": "carol"}),
    ("admin", "PATCH", "/v1/users/bob", {"enabled": False}),
    ("admin", "DELETE", "/v1/users/bob", None),
    ("admin", "POST", "/v1/nodes", {"name": "node-2", "initiator": initiator("node-2")}),
    ("admin", "PATCH", "/v1/nodes/node-1", {"enabled": False}),
    ("admin", "DELETE", "/v1/nodes/node-1", None),
    ("admin", "POST", "/v1/groups", {"name": "foes"}),
    ("admin", "PUT", "/v1/groups/friends", {"members": ["bob"]}),
    ("admin", "DELETE", "/v1/groups/friends", None),
    ("admin", "PUT", "/v1/quotas/alice", {"size": MIB, "count": 1}),
]


@pytest.mark.parametrize(("who", "method", "path", "body"), WOULD)
def test_what_would_be_done(site: Site, who: str, method: str, path: str, body: Any) -> None:
    answer = site.plan(who, method, path, body)
    assert answer.status_code == 200, answer.text
    plan = answer.json()
    assert (plan["dry_run"], plan["allowed"], plan["conflicts"]) == (True, True, [])
    assert plan["steps"]
    assert plan["quota"]["user"] == who


def test_every_mutation_is_planned_here(site: Site) -> None:
    paths = requests.get(site.service.base + "/v1/openapi.json", timeout=30).json()["paths"]
    mutations = {
        (method.upper(), path)
        for path, operations in paths.items()
        for method, operation in operations.items()
        if method != "get" and not path.endswith("/upload")  # bytes, and no intention
    }
    for method, path in mutations:
        assert "dry_run" in {p["name"] for p in paths[path][method.lower()]["parameters"]}
    assert len({(method, _shape(path)) for _, method, path, _ in WOULD}) == len(mutations)


def _shape(path: str) -> str:
    words = path.partition("?")[0].split("/")
    return "/".join([*words[:3], "*" if len(words) > 3 else "", *words[4:]])


def test_the_plan_shows_quota_and_space_as_they_would_be(site: Site) -> None:
    now = site.alice.get("/v1/quotas/alice").json()
    promised = site.alice.get("/v1/pools").json()["items"][0]["promised"]
    plan = site.plan("alice", "POST", "/v1/volumes", {"size": 8 * MIB}).json()
    assert plan["quota"] == now | {"used_size": now["used_size"] + 8 * MIB, "used_count": now["used_count"] + 1}
    assert plan["space"]["promised"] == promised + 8 * MIB
    assert plan["steps"] == ["make an empty backing of the volume's size, durably"]


#: Who, operation, body, the code of the conflict.
CONFLICTS = [
    ("alice", "POST", "/v1/volumes", {"size": 63 << 40}, {"quota-exceeded", "pool-overcommitted"}),
    ("alice", "POST", "/v1/volumes", {"volume": "{free}", "size": MIB}, {"size-too-small"}),
    ("alice", "POST", "/v1/volumes", {"volume": "{used}"}, {"clone-needs-detach", None}),
    ("alice", "DELETE", "/v1/volumes/{used}", None, {"volume-in-use"}),
    ("alice", "PATCH", "/v1/volumes/{free}", {"size": MIB}, {"shrink-refused"}),
    ("alice", "POST", "/v1/volumes/{used}/attachments", ATTACH, {"volume-in-use"}),
    ("alice", "POST", "/v1/volumes/{used}/snapshots", {}, {"snapshot-needs-detach", None}),
    ("alice", "POST", "/v1/volumes/{used}/revert", {"snapshot": "{snapshot}"}, {"snapshot-of-another"}),
    ("admin", "DELETE", "/v1/attachments/{attachment}", None, {"force-required"}),
    ("admin", "POST", "/v1/users", {"name": "bob"}, {"name-taken"}),
    ("admin", "POST", "/v1/nodes", {"name": "n", "initiator": initiator("node-1")}, {"name-taken"}),
    ("admin", "POST", "/v1/groups", {"name": "friends"}, {"name-taken"}),
    ("admin", "DELETE", "/v1/users/alice", None, {"user-in-use"}),
    ("admin", "DELETE", "/v1/users/admin", None, {"last-admin"}),
    ("admin", "PATCH", "/v1/users/admin", {"enabled": False}, {"last-admin"}),
]


@pytest.mark.parametrize(("who", "method", "path", "body", "codes"), CONFLICTS)
def test_what_stands_against_it(
    site: Site, who: str, method: str, path: str, body: Any, codes: set[str | None]
) -> None:
    """As a plan that is not allowed; done in earnest it is 409 with the same code (None: where the pool can do it)."""
    plan = site.plan(who, method, path, body).json()
    if plan["allowed"]:
        assert None in codes
        assert site.alice.get("/v1/pools").json()["items"][0]["live_clone"] is True
        return
    assert plan["steps"] == []
    [conflict] = plan["conflicts"]
    assert conflict["code"] in codes
    assert conflict["detail"]
    filled = {k: v.format(**site.names) if isinstance(v, str) else v for k, v in body.items()} if body else body
    with unchanged(site.service):
        earnest = getattr(site, who).request(method, path.format(**site.names), json=filled)
    problem(earnest, 409, conflict["code"])


ERRORS = [
    ("bob", "DELETE", "/v1/volumes/{free}", None, 404, "volume-not-found"),
    ("bob", "POST", "/v1/volumes", {"snapshot": "{snapshot}"}, 404, "snapshot-not-found"),
    ("alice", "POST", "/v1/volumes", {"size": MIB, "pool": "none"}, 404, "pool-not-found"),
    ("alice", "POST", "/v1/volumes", {"volume": NOWHERE}, 404, "volume-not-found"),
    ("alice", "POST", "/v1/users", {"name": "x"}, 403, "admin-only"),
    ("alice", "POST", "/v1/volumes/{free}/reset-state", {}, 403, "admin-only"),
    ("alice", "DELETE", "/v1/attachments/{attachment}?force=true", None, 403, "admin-only"),
    ("alice", "POST", "/v1/volumes/{free}/attachments", NODES, 403, "initiator-of-a-node"),
    ("alice", "POST", "/v1/volumes", {"size": 1}, 422, "invalid-request"),
    ("alice", "POST", "/v1/volumes", {}, 422, "invalid-request"),
]  # fmt: skip


@pytest.mark.parametrize(("who", "method", "path", "body", "status", "code"), ERRORS)
def test_other_refusals_stay_refusals(
    site: Site, who: str, method: str, path: str, body: Any, status: int, code: str
) -> None:
    problem(site.plan(who, method, path, body), status, code)


def test_a_stale_version_is_refused(site: Site) -> None:
    path = f"/v1/volumes/{site.names['free']}?dry_run=true"
    with unchanged(site.service):
        problem(site.alice.delete(path, headers={"If-Match": '"v0"'}), 412, "precondition-failed")
