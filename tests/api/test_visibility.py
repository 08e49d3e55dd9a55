"""Who may see and do what; and that what you may not see is the same as what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.api.support import MIB, NOWHERE, events, initiator, problem, unchanged
from tests.support.service import Api, RunningService, running

WHO = ("owner", "writer", "reader", "stranger", "node", "admin")
SECRET = "name-that-strangers-never-read"


@dataclass
class Site:
    """A volume of the owner's that is shared (rw with the writers, ro with the readers), and a public one."""

    service: RunningService
    apis: dict[str, Api]
    ids: dict[str, str]

    def __getattr__(self, who: str) -> Api:
        return self.apis[who]

    def plan(self, who: str, method: str, path: str, body: Any = None) -> tuple[int, str | None]:
        """Status and code of a mutation that is not made."""
        answer = self.apis[who].request(method, path.format(**self.ids), params={"dry_run": "true"}, json=body)
        document = answer.json()
        if answer.status_code == 200 and not document["allowed"]:
            return 409, document["conflicts"][0]["code"]
        return answer.status_code, document.get("code")


@pytest.fixture(scope="module")
def site(service: RunningService) -> Site:
    apis = {name: service.user(name) for name in ("owner", "writer", "reader", "stranger")}
    apis["node"] = service.node("node-1", initiator("node"))
    apis["other"] = service.node("node-2", initiator("other"))
    apis["admin"] = service.admin
    for group, member in (("writers", "writer"), ("readers", "reader"), ("owners", "owner")):
        service.admin.post("/v1/groups", json={"name": group})
        service.admin.put(f"/v1/groups/{group}", json={"members": [member, "owner"]})
    owner = apis["owner"]
    ids = {
        "private": owner.make_volume(MIB, name=SECRET)["id"],
        "public": owner.make_volume(MIB, visibility="public")["id"],
    }
    for group, mode in (("writers", "rw"), ("readers", "ro")):
        assert owner.put(f"/v1/volumes/{ids['private']}/shares", json={"group": group, "mode": mode}).status_code == 200
    ids["snapshot"] = owner.post(f"/v1/volumes/{ids['private']}/snapshots", json={"name": SECRET}).json()["id"]
    return Site(service, apis, ids)


# ---------------------------------------------------------------- the matrix

RO = {"instance_id": "i", "node": "n", "initiator": initiator("machine"), "mode": "ro"}
RW = RO | {"mode": "rw"}
OK, GONE, NOT_OWNER = (200, None), (404, "volume-not-found"), (403, "not-owner")
READ_ONLY, ADMIN, NOT_HERE = (403, "read-only-access"), (403, "admin-only"), (403, "not-this-node")
NO_SNAPSHOT = (404, "snapshot-not-found")

REVERT = {"snapshot": "{snapshot}"}

#: method, path, body: what the owner, a writer, a reader, a stranger, a node, an admin are answered.
MATRIX: list[tuple[str, str, Any, tuple[tuple[int, str | None], ...]]] = [
    ("POST", "/v1/volumes/{private}/attachments", RW, (OK, OK, READ_ONLY, GONE, NOT_HERE, OK)),
    ("POST", "/v1/volumes/{private}/attachments", RO, (OK, OK, OK, GONE, NOT_HERE, OK)),
    ("POST", "/v1/volumes", {"volume": "{private}"}, (OK, OK, OK, GONE, OK, OK)),
    ("POST", "/v1/volumes", {"snapshot": "{snapshot}"}, (OK, NO_SNAPSHOT, NO_SNAPSHOT, NO_SNAPSHOT, OK, OK)),
    ("POST", "/v1/volumes/{private}/snapshots", {}, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("PATCH", "/v1/volumes/{private}", {"name": "x"}, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("PATCH", "/v1/volumes/{private}", {"size": 2 * MIB}, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("DELETE", "/v1/volumes/{private}", None, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("POST", "/v1/volumes/{private}/revert", REVERT, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("POST", "/v1/volumes/{private}/reset-state", {}, (ADMIN, ADMIN, ADMIN, ADMIN, ADMIN, OK)),
    ("PUT", "/v1/volumes/{private}/shares", {"group": "owners"}, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("DELETE", "/v1/volumes/{private}/shares?group=readers", None, (OK, NOT_OWNER, NOT_OWNER, GONE, NOT_OWNER, OK)),
    ("DELETE", "/v1/snapshots/{snapshot}", None, (OK, NO_SNAPSHOT, NO_SNAPSHOT, NO_SNAPSHOT, NOT_OWNER, OK)),
    ("POST", "/v1/volumes/{public}/attachments", RW, (OK, READ_ONLY, READ_ONLY, READ_ONLY, NOT_HERE, OK)),
    ("POST", "/v1/volumes/{public}/attachments", RO, (OK, OK, OK, OK, NOT_HERE, OK)),
    ("POST", "/v1/volumes", {"volume": "{public}"}, (OK, OK, OK, OK, OK, OK)),
    ("PATCH", "/v1/volumes/{public}", {"name": "x"}, (OK, NOT_OWNER, NOT_OWNER, NOT_OWNER, NOT_OWNER, OK)),
    ("DELETE", "/v1/volumes/{public}", None, (OK, NOT_OWNER, NOT_OWNER, NOT_OWNER, NOT_OWNER, OK)),
    ("POST", "/v1/volumes/{public}/snapshots", {}, (OK, NOT_OWNER, NOT_OWNER, NOT_OWNER, NOT_OWNER, OK)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "expected"), MATRIX)
def test_who_may_do_what(
    site: Site, method: str, path: str, body: Any, expected: tuple[tuple[int, str | None], ...]
) -> None:
    filled = {k: v.format(**site.ids) if isinstance(v, str) else v for k, v in body.items()} if body else body
    with unchanged(site.service):
        assert {who: site.plan(who, method, path, filled) for who in WHO} == dict(zip(WHO, expected, strict=True))


@pytest.mark.parametrize(
    ("path", "seen_by"),
    [
        ("/v1/volumes/{private}", {"owner", "writer", "reader", "node", "admin"}),
        ("/v1/volumes/{public}", set(WHO)),
        ("/v1/snapshots/{snapshot}", {"owner", "node", "admin"}),
    ],
)
def test_who_may_see_what(site: Site, path: str, seen_by: set[str]) -> None:
    kind, identifier = path.split("/")[2], path.format(**site.ids).split("/")[3]
    for who in WHO:
        shown = site.apis[who].get(path.format(**site.ids)).status_code
        listed = identifier in [item["id"] for item in site.apis[who].get(f"/v1/{kind}").json()["items"]]
        assert (shown, listed) == ((200, True) if who in seen_by else (404, False)), who


def test_a_share_that_ends_takes_the_sight_along(site: Site) -> None:
    volume = site.owner.make_volume(MIB)["id"]
    path = f"/v1/volumes/{volume}"
    ends: dict[str, Callable[[], requests.Response]] = {
        "unshared": lambda: site.owner.delete(f"{path}/shares?group=unshared"),
        "left": lambda: site.admin.put("/v1/groups/left", json={"members": ["owner"]}),
        "dissolved": lambda: site.admin.delete("/v1/groups/dissolved"),
    }
    for group, end in ends.items():
        site.admin.post("/v1/groups", json={"name": group})
        site.admin.put(f"/v1/groups/{group}", json={"members": ["owner", "stranger"]})
        assert site.stranger.get(path).status_code == 404
        site.owner.put(f"{path}/shares", json={"group": group})
        assert site.stranger.get(path).status_code == 200
        assert end().status_code in (200, 204)
        assert site.stranger.get(path).status_code == 404


def test_what_is_made_private_is_gone_for_others(site: Site) -> None:
    volume = site.owner.make_volume(MIB, visibility="public")["id"]
    assert site.stranger.get(f"/v1/volumes/{volume}").status_code == 200
    site.owner.patch(f"/v1/volumes/{volume}", json={"visibility": "private"})
    problem(site.stranger.get(f"/v1/volumes/{volume}"), 404, "volume-not-found")


def test_a_group_may_be_shared_with_by_its_members_only(site: Site) -> None:
    """Naming a group of others tells nothing about it."""
    volume = site.stranger.make_volume(MIB)["id"]
    known = site.stranger.put(f"/v1/volumes/{volume}/shares", json={"group": "writers"})
    unknown = site.stranger.put(f"/v1/volumes/{volume}/shares", json={"group": "nothing"})
    assert problem(known, 404, "group-not-found")["detail"].replace("writers", "nothing") == unknown.json()["detail"]


# ---------------------------------------------------------------- nothing leaks

BODIES = {
    "update_volume": {"name": "x"},
    "create_attachment": RO,
    "create_snapshot": {},
    "revert_volume": {"snapshot": NOWHERE},
    "share_volume": {"group": "none"},
    "reset_volume_state": {},
    "cancel_operation": {},
    "update_user": {"password": "correct horse battery"},
    "update_node": {"enabled": True},
    "update_group": {"members": []},
    "set_quota": {"count": 1},
    "update_image": {"name": "x"},
}
#: A piece of an upload.
PIECE = {"data": b"x", "headers": {"Content-Type": "application/octet-stream", "Content-Range": "bytes 0-0/1"}}


@pytest.fixture(scope="module")
def theirs(site: Site) -> dict[str, str]:
    """Things of others, by the path that shows them."""
    attached = site.owner.attach(site.ids["private"], initiator("owner"), "ro")["id"]
    operation = site.owner.get("/v1/operations").json()["items"][0]["id"]
    token = site.owner.post("/v1/tokens", json={}).json()["id"]
    upload = {"size": MIB, "checksum": "sha256:" + "0" * 64, "format": "raw"}
    image = site.owner.post("/v1/images", json={"upload": upload}).json()["id"]
    return {
        "/v1/volumes/": site.ids["private"], "/v1/snapshots/": site.ids["snapshot"], "/v1/attachments/": attached,
        "/v1/operations/": operation, "/v1/tokens/": token, "/v1/users/": "owner", "/v1/nodes/": "node-1",
        "/v1/groups/": "writers", "/v1/quotas/": "owner", "/v1/images/": image,
    }  # fmt: skip


def test_what_you_may_not_see_is_answered_like_what_is_not_there(site: Site, theirs: dict[str, str]) -> None:
    """Every operation on a thing of others, plan or deed: as for an id that nobody has, down to the wording."""
    paths = requests.get(site.service.base + "/v1/openapi.json", timeout=30).json()["paths"]
    compared = 0
    with unchanged(site.service):
        for path, operations in paths.items():
            prefix = path.partition("{")[0]
            if "{" not in path:
                continue
            existing, missing = theirs[prefix], NOWHERE if "id}" in path else "nobody"
            for method, operation in operations.items():
                plans = any(each["name"] == "dry_run" for each in operation["parameters"])
                for parameters in ({}, {"dry_run": "true"}) if plans else ({},):
                    given = parameters | ({"group": "none"} if operation["operationId"] == "unshare_volume" else {})
                    rest = path.partition("}")[2].replace("{name}", "a-name")
                    body = PIECE if operation["operationId"] == "put_upload" else {
                        "json": BODIES.get(operation["operationId"])
                    }  # fmt: skip
                    answers = [
                        site.stranger.request(method.upper(), prefix + name + rest, params=given, **body)
                        for name in (existing, missing)
                    ]
                    told = [
                        (a.status_code, a.text.replace(n, "…"))
                        for a, n in zip(answers, (existing, missing), strict=True)
                    ]
                    assert told[0] == told[1], (method, path)
                    assert told[0][0] in (403, 404), (method, path, told)
                    compared += 1
    assert compared > 35


@pytest.mark.parametrize(
    "path",
    [
        "/v1/volumes?owner=owner&limit=1000", "/v1/volumes?name=" + SECRET, "/v1/volumes?state=in-use",
        "/v1/snapshots", "/v1/snapshots?volume={private}", "/v1/snapshots?name=" + SECRET,
        "/v1/attachments", "/v1/attachments?volume={private}", "/v1/attachments?node=test",
        "/v1/operations", "/v1/operations?resource={private}", "/v1/tokens", "/v1/groups", "/v1/pools", "/v1/whoami",
    ],
)  # fmt: skip
def test_no_list_and_no_filter_tells_of_others(site: Site, theirs: dict[str, str], path: str) -> None:
    text = site.stranger.get(path.format(**site.ids)).text
    for hidden in (SECRET, "writers", *(identifier for identifier in theirs.values() if len(identifier) == 36)):
        assert hidden not in text


def test_a_public_volume_tells_neither_its_attachments_nor_its_origin(site: Site) -> None:
    copied = site.owner.post("/v1/volumes", json={"snapshot": site.ids["snapshot"], "visibility": "public"}).json()
    assert copied["origin"] == {"kind": "snapshot", "id": site.ids["snapshot"]}
    hers = site.owner.attach(copied["id"], initiator("public-1"), "ro")["id"]
    his = site.stranger.attach(copied["id"], initiator("public-2"), "ro")["id"]
    assert _attachments(site.stranger, copied["id"]) == {his}
    assert _attachments(site.reader, copied["id"]) == set()
    assert _attachments(site.owner, copied["id"]) == _attachments(site.admin, copied["id"]) == {hers, his}
    assert site.stranger.get(f"/v1/volumes/{copied['id']}").json()["origin"] is None


def _attachments(api: Api, volume: str) -> set[str]:
    return {attachment["id"] for attachment in api.get(f"/v1/volumes/{volume}").json()["attachments"]}


@pytest.mark.parametrize("path", ["/v1/users", "/v1/nodes", "/v1/events", "/v1/users/node-1", "/v1/nodes/owner"])
@pytest.mark.parametrize("who", ["stranger", "node"])
def test_what_is_for_admins(site: Site, who: str, path: str) -> None:
    answer = site.apis[who].get(path)
    problem(
        answer, answer.status_code, "admin-only" if path.count("/") == 2 else f"{path.split('/')[2][:-1]}-not-found"
    )


def test_everyone_finds_themselves(site: Site) -> None:
    assert site.stranger.get("/v1/users/stranger").json()["role"] == "user"
    assert site.node.get("/v1/nodes/node-1").json()["initiator"] == initiator("node")
    assert site.stranger.get("/v1/quotas/stranger").json()["user"] == "stranger"
    assert site.writer.get("/v1/groups/writers").json()["members"] == ["owner", "writer"]


# ---------------------------------------------------------------- connections


def test_a_connection_is_for_who_attached(site: Site) -> None:
    volume = site.owner.make_volume(MIB)["id"]
    site.owner.put(f"/v1/volumes/{volume}/shares", json={"group": "writers", "mode": "rw"})
    attached = site.writer.attach(volume, initiator("reads"))
    path = f"/v1/attachments/{attached['id']}/connection"
    for who in ("owner", "admin"):
        problem(site.apis[who].get(path), 403, "not-your-connection")
    for who in ("reader", "stranger", "node"):
        problem(site.apis[who].get(path), 404, "attachment-not-found")
    assert _readings(site, attached["id"]) == []
    for count in (1, 2):
        answer = site.writer.get(path)
        assert answer.json() == attached["connection"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert _readings(site, attached["id"]) == ["writer"] * count
    for who in ("writer", "owner", "admin"):
        assert attached["connection"]["auth"]["password"] not in site.apis[who].get("/v1/attachments").text
    site.writer.detach(attached["id"])
    problem(site.writer.get(path), 409, "attachment-ended")


def _readings(site: Site, attachment: str) -> list[str]:
    return [event["actor"] for event in events(site.service, attachment) if event["kind"].endswith("connection-read")]


# ---------------------------------------------------------------- who detaches


def test_only_who_attached_detaches_or_an_admin_with_force(site: Site) -> None:
    volume = site.owner.make_volume(MIB)["id"]
    body = {"instance_id": "i", "node": "node-1", "initiator": initiator("node")}
    attached = site.node.post(f"/v1/volumes/{volume}/attachments", json=body).json()["id"]
    path = f"/v1/attachments/{attached}"
    assert site.owner.get(path).json()["direct"] is False
    with unchanged(site.service):
        problem(site.owner.delete(path), 409, "attached-by-another")
        problem(site.owner.delete(path + "?force=true"), 403, "admin-only")
        problem(site.admin.delete(path), 409, "force-required")
        for who in ("other", "stranger", "reader"):
            problem(site.apis[who].delete(path), 404, "attachment-not-found")
        problem(site.apis["other"].delete(path + "?force=true"), 404, "attachment-not-found")
    assert site.node.delete(path).status_code == 204
    attached = site.node.post(f"/v1/volumes/{volume}/attachments", json=body).json()["id"]
    assert site.admin.delete(f"/v1/attachments/{attached}?force=true").status_code == 204
    detached = [event for event in events(site.service, attached) if event["kind"] == "attachment.detach"]
    assert [(event["actor"], '"force"' in event["detail"]) for event in detached] == [("admin", True)]


@pytest.mark.parametrize(
    "wrong",
    [{"node": "node-2"}, {"initiator": initiator("other")}, {"node": "node-2", "initiator": initiator("other")}],
)
def test_a_node_attaches_to_itself_only(site: Site, wrong: dict[str, str]) -> None:
    body = {"instance_id": "i", "node": "node-1", "initiator": initiator("node")} | wrong
    with unchanged(site.service):
        answer = site.node.post(f"/v1/volumes/{site.ids['public']}/attachments", json=body | {"mode": "ro"})
    problem(answer, 403, "not-this-node")


@pytest.mark.parametrize("who", ["owner", "admin"])
@pytest.mark.parametrize("name", [initiator("node"), initiator("node").upper().replace("IQN", "iqn")])
def test_the_initiator_of_a_node_is_the_nodes(site: Site, who: str, name: str) -> None:
    with unchanged(site.service):
        answer = site.apis[who].post(f"/v1/volumes/{site.ids['public']}/attachments", json=RO | {"initiator": name})
    problem(answer, 403, "initiator-of-a-node")


# ---------------------------------------------------------------- direct attachments that the site does not allow


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    environment = {"STRATUS_ATTACHMENTS__DIRECT": "false"}
    with running(tmp_path_factory.mktemp("strict") / "home", environment) as started:
        yield started


def test_owners_attach_directly_only_where_the_site_allows_it(strict: RunningService) -> None:
    owner, node = strict.user("owner"), strict.node("node", initiator("node"))
    volume = owner.make_volume(MIB)["id"]
    with unchanged(strict):
        problem(owner.post(f"/v1/volumes/{volume}/attachments", json=RW), 403, "direct-attach-disabled")
        problem(owner.post(f"/v1/volumes/{volume}/attachments?dry_run=true", json=RW), 403, "direct-attach-disabled")
    attached = node.post(
        f"/v1/volumes/{volume}/attachments", json=RW | {"node": "node", "initiator": initiator("node")}
    )
    assert attached.status_code == 201
