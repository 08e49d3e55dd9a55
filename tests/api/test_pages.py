"""Pages: every record once, whatever is asked for and whatever happens meanwhile; and versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.api.support import MIB, initiator, problem, unchanged
from tests.support.service import Api, RunningService


@dataclass
class Site:
    service: RunningService
    alice: Api
    bob: Api
    own: list[str]
    public: list[str]
    shared: list[str]


@pytest.fixture(scope="module")
def site(service: RunningService) -> Site:
    """Alice has volumes of her own, some public; Bob has public ones and ones shared with her in one or two groups."""
    alice, bob = service.user("alice"), service.user("bob")
    for group in ("one", "two"):
        service.admin.post("/v1/groups", json={"name": group})
        service.admin.put(f"/v1/groups/{group}", json={"members": ["alice", "bob"]})
    own, public, shared = [], [], []
    for number in range(4):
        own.append(alice.make_volume(MIB, name="own", visibility="public" if number % 2 else "private")["id"])
        public.append(bob.make_volume(MIB, name="public", visibility="public")["id"])
        shared.append(bob.make_volume(MIB, name="shared", visibility="public" if number == 3 else "private")["id"])
        bob.make_volume(MIB, name="hidden")
        for group in ("one", "two")[: 1 + number % 2]:
            bob.put(f"/v1/volumes/{shared[-1]}/shares", json={"group": group, "mode": "ro"})
    return Site(service, alice, bob, own, public, shared)


def walk(api: Api, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
    """Every item of a list, page by page; no page is longer than asked for, none but the last shorter."""
    following: str | None = None
    while True:
        given = parameters | ({"next": following} if following else {})
        page = api.get(path, params=given).json()
        yield from page["items"]
        following = page["next"]
        if following is None:
            assert len(page["items"]) <= parameters["limit"]
            return
        assert len(page["items"]) == parameters["limit"]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 12, 13, 1000])
def test_every_visible_volume_comes_once(site: Site, limit: int) -> None:
    seen = [volume["id"] for volume in walk(site.alice, "/v1/volumes", limit=limit)]
    assert sorted(seen) == sorted(site.own + site.public + site.shared)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"name": "own"}, "own"),
        ({"name": "shared"}, "shared"),
        ({"name": "hidden"}, None),
        ({"owner": "alice"}, "own"),
        ({"owner": "nobody"}, None),
        ({"owner": "bob", "name": "public", "state": "available"}, "public"),
        ({"state": "in-use"}, None),
    ],
)
def test_filters(site: Site, parameters: dict[str, str], expected: str | None) -> None:
    seen = [volume["id"] for volume in walk(site.alice, "/v1/volumes", limit=2, **parameters)]
    assert sorted(seen) == (sorted(getattr(site, expected)) if expected else [])


def test_a_walk_is_not_disturbed_by_what_comes_and_goes(site: Site) -> None:
    """What is there from the beginning to the end comes once; what was deleted on the way harms no cursor."""
    stays, goes = [], []
    for _ in range(4):
        stays.append(site.alice.make_volume(MIB, name="walk")["id"])
        goes.append(site.alice.make_volume(MIB, name="walk")["id"])
    seen = []
    for volume in walk(site.alice, "/v1/volumes", limit=2, name="walk"):
        seen.append(volume["id"])
        if volume["id"] in goes and len(seen) % 4 == 2:
            site.alice.delete(f"/v1/volumes/{volume['id']}")
        if len(seen) == 3:
            late = site.alice.make_volume(MIB, name="walk")["id"]
    assert [identifier for identifier in seen if identifier in stays] == stays
    assert len(seen) == len(set(seen))
    assert seen[-1] == late
    for volume in (*stays, *goes, late):
        site.alice.delete(f"/v1/volumes/{volume}")


def test_the_other_lists(site: Site) -> None:
    admin = site.service.admin
    volume = site.bob.make_volume(MIB)["id"]
    for _ in range(3):
        site.bob.post(f"/v1/volumes/{volume}/snapshots", json={"name": "s"})
        site.bob.post("/v1/tokens", json={})
    attached = [site.bob.attach(volume, initiator(f"page-{n}"), "ro")["id"] for n in range(3)]
    for path, api, least in (
        ("/v1/snapshots", site.bob, 3), ("/v1/attachments", site.bob, 3), ("/v1/tokens", site.bob, 4),
        ("/v1/operations", site.bob, 10), ("/v1/groups", site.bob, 2), ("/v1/users", admin, 3),
        ("/v1/events", admin, 20),
    ):  # fmt: skip
        small = [item["id"] for item in walk(api, path, limit=2)]
        whole = [item["id"] for item in walk(api, path, limit=1000)]
        assert len(small) == len(set(small)) >= least, path
        assert small == whole or path == "/v1/events", path
    assert {a["id"] for a in walk(site.bob, "/v1/attachments", limit=2, volume=volume, state="attached")} == set(
        attached
    )
    for identifier in attached:
        site.bob.detach(identifier)
    assert [*walk(site.bob, "/v1/attachments", limit=2, volume=volume, state="attached")] == []
    assert {a["id"] for a in walk(site.bob, "/v1/attachments", limit=2, volume=volume)} == set(attached)


def test_the_newest_operations_and_events_come_first(site: Site) -> None:
    for api, path in ((site.bob, "/v1/operations"), (site.service.admin, "/v1/events")):
        seen = [item["id"] for item in api.get(path, params={"limit": 1000}).json()["items"]]
        assert seen == sorted(seen, reverse=True)


# ---------------------------------------------------------------- versions


def test_a_change_to_a_version_that_is_no_longer_there(site: Site) -> None:
    """Two read, both change: the second is told, and reads again."""
    path = f"/v1/volumes/{site.alice.make_volume(MIB)['id']}"
    seen = site.alice.get(path).headers["ETag"]
    first = site.alice.patch(path, json={"name": "first"}, headers={"If-Match": seen})
    assert first.headers["ETag"] == site.alice.get(path).headers["ETag"] != seen
    with unchanged(site.service):
        problem(site.alice.patch(path, json={"name": "second"}, headers={"If-Match": seen}), 412, "precondition-failed")
        problem(site.alice.delete(path, headers={"If-Match": seen}), 412, "precondition-failed")
    assert site.alice.get(path).json()["name"] == "first"
    assert site.alice.delete(path, headers={"If-Match": first.headers["ETag"]}).status_code == 204


def test_any_version_will_do(site: Site) -> None:
    path = f"/v1/volumes/{site.alice.make_volume(MIB)['id']}"
    assert site.alice.patch(path, json={"name": "x"}, headers={"If-Match": "*"}).json()["name"] == "x"


def test_every_change_is_another_version(site: Site) -> None:
    volume = site.alice.make_volume(MIB)["id"]
    path, seen = f"/v1/volumes/{volume}", set()

    def look() -> None:
        tag = site.alice.get(path).headers["ETag"]
        assert tag not in seen
        seen.add(tag)

    look()
    site.alice.patch(path, json={"name": "x"})
    look()
    site.alice.patch(path, json={"size": 2 * MIB})
    look()
    attached = site.alice.attach(volume, initiator("version"))["id"]
    look()
    site.alice.detach(attached)
    look()


def test_a_snapshot_has_a_version_too(site: Site) -> None:
    volume = site.alice.make_volume(MIB)["id"]
    made = site.alice.post(f"/v1/volumes/{volume}/snapshots", json={})
    path = made.headers["Location"]
    assert made.headers["ETag"] == site.alice.get(path).headers["ETag"]
    problem(site.alice.delete(path, headers={"If-Match": '"v77"'}), 412, "precondition-failed")
    assert site.alice.delete(path, headers={"If-Match": made.headers["ETag"]}).status_code == 204
