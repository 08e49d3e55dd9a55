"""/v1/images over HTTP: who sees what, what is refused, and that asking twice is asking once."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.support import NOWHERE, events, initiator, problem, unchanged
from tests.support.imagehouse import MIB, content, sha256
from tests.support.origin import Origin
from tests.support.service import Api, RunningService, running

URL = "http://127.0.0.1:1/image.raw?token=hush"
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    allowed = {"STRATUS_IMAGES__ALLOW_NETWORKS": '["127.0.0.0/8"]'}
    with running(tmp_path_factory.mktemp("images") / "home", allowed) as started:
        yield started


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as started:
        yield started


@pytest.fixture(scope="module")
def who(service: RunningService) -> dict[str, Api]:
    people = {name: service.user(name) for name in ("owner", "asker", "stranger")}
    return people | {"node": service.node("node-1", initiator("node-1")), "admin": service.admin}


def publish(origin: Origin, seed: int, **faults: Any) -> dict[str, str]:
    data = content(seed, MIB)
    origin.put(f"/{seed}.raw", data, **faults)
    return {"reference": origin.url(f"/{seed}.raw") + "?token=hush", "checksum": sha256(data)}


@pytest.fixture(scope="module")
def image(who: dict[str, Api], origin: Origin) -> dict[str, Any]:
    """The owner's, which the asker asked for as well."""
    asked = publish(origin, 1)
    made = who["owner"].post("/v1/images", json={**asked, "name": "mine"}, headers={"Prefer": "wait=30"})
    assert made.status_code == 201, made.text
    again = who["asker"].post("/v1/images", json=asked, headers={"Prefer": "wait=30"})
    assert (again.status_code, again.json()["id"]) == (201, made.json()["id"])
    return made.json()  # type: ignore[no-any-return]


# ---------------------------------------------------------------- who sees what


@pytest.mark.parametrize(
    ("name", "seen", "reference"),
    [("owner", True, True), ("asker", True, True), ("stranger", False, False), ("node", True, False),
     ("admin", True, True)],
)  # fmt: skip
def test_who_sees_an_image_and_its_reference(
    who: dict[str, Api], image: dict[str, Any], name: str, seen: bool, reference: bool
) -> None:
    answer = who[name].get(f"/v1/images/{image['id']}")
    listed = [found["id"] for found in who[name].show("/v1/images")["items"]]
    assert (image["id"] in listed) is seen
    if not seen:
        problem(answer, 404, "image-not-found")
        return
    assert (answer.json()["reference"] is not None) is reference
    assert answer.json()["digest"] == image["digest"]
    assert answer.headers["ETag"].startswith('"v')


def test_who_asked_for_the_same_does_not_learn_whose_it_is(who: dict[str, Api], image: dict[str, Any]) -> None:
    told = {name: who[name].show(f"/v1/images/{image['id']}") for name in ("owner", "asker", "node", "admin")}
    mine, nobody = ("owner", "mine"), (None, None)
    assert {name: (found["owner"], found["name"]) for name, found in told.items()} == {
        "owner": mine, "asker": nobody, "node": mine, "admin": mine
    }  # fmt: skip
    for words in ({"owner": "owner"}, {"name": "mine"}):
        assert who["asker"].get("/v1/images", params=words).json()["items"] == []


#: method, path below the image, body: what an asker, a stranger, a node are told.
MATRIX: list[tuple[str, str, Any, tuple[str | None, str | None, str | None]]] = [
    ("PATCH", "", {"name": "x"}, ("not-owner", "image-not-found", "not-owner")),
    ("DELETE", "", None, ("not-owner", "image-not-found", "not-owner")),
    ("GET", "/pins", None, ("nodes-only", "image-not-found", None)),
    ("PUT", "/pins/vm-1", None, ("nodes-only", "image-not-found", None)),
    ("DELETE", "/pins/vm-9", None, ("nodes-only", "image-not-found", "pin-not-found")),
]


@pytest.mark.parametrize(("method", "below", "body", "told"), MATRIX, ids=lambda v: v if isinstance(v, str) else "")
def test_who_may_what(
    who: dict[str, Api], image: dict[str, Any], method: str, below: str, body: Any, told: tuple[str | None, ...]
) -> None:
    params = {} if method == "GET" else {"dry_run": "true"}
    for name, code in zip(("asker", "stranger", "node"), told, strict=True):
        answer = who[name].request(method, f"/v1/images/{image['id']}{below}", json=body, params=params)
        assert answer.json().get("code") == code, (name, answer.text)


def test_what_is_not_there_and_what_is_not_yours_are_the_same(who: dict[str, Api], image: dict[str, Any]) -> None:
    for body in ({"image": NOWHERE}, {"image": image["id"]}):
        told = problem(who["stranger"].post("/v1/volumes", json=body), 404, "image-not-found")
        assert told["detail"] == f"There is no image {body['image']} that you may see."


def test_no_event_holds_the_secret_of_a_url(service: RunningService, image: dict[str, Any]) -> None:
    assert [event for event in events(service, image["id"]) if "hush" in event["detail"]] == []


def test_a_node_learns_where_the_file_is(service: RunningService, who: dict[str, Api], image: dict[str, Any]) -> None:
    told = who["node"].put(f"/v1/images/{image['id']}/pins/vm-1").json()
    assert (told["name"], told["kind"], told["format"]) == ("vm-1", "overlay", "qcow2")
    assert sha256(Path(told["path"]).read_bytes()) == told["digest"] == image["digest"]
    assert who["node"].show(f"/v1/images/{image['id']}/pins")["items"][0]["principal"] == "node-1"
    assert who["asker"].show(f"/v1/images/{image['id']}")["pins"] == 1
    problem(who["owner"].delete(f"/v1/images/{image['id']}"), 409, "image-pinned")
    assert who["node"].delete(f"/v1/images/{image['id']}/pins/vm-1").status_code == 204
    problem(who["node"].delete(f"/v1/images/{image['id']}/pins/vm-1"), 404, "pin-not-found")


# ---------------------------------------------------------------- what is refused

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "/reference"),
    ({"reference": URL, "volume": NOWHERE}, "/reference"),
    ({"reference": ""}, "/reference"),
    ({"reference": "two words"}, "/reference"),
    ({"reference": "x" * 2049}, "/reference"),
    ({"reference": 5}, "/reference"),
    ({"reference": URL, "checksum": "abc"}, "/checksum"),
    ({"reference": URL, "checksum": "md5:" + "0" * 32}, "/checksum"),
    ({"volume": NOWHERE, "checksum": DIGEST}, "/checksum"),
    ({"reference": URL, "colour": "red"}, "/colour"),
    ({"reference": URL, "visibility": "secret"}, "/visibility"),
    ({"upload": {"size": 5, "format": "raw"}}, "/upload/checksum"),
    ({"upload": {"size": 0, "format": "raw", "checksum": DIGEST}}, "/upload/size"),
    ({"upload": {"size": 1 << 45, "format": "raw", "checksum": DIGEST}}, "/upload/size"),
    ({"upload": {"size": 5, "format": "vmdk", "checksum": DIGEST}}, "/upload/format"),
    ({"upload": {"size": 5, "format": "raw", "checksum": DIGEST, "compression": "7z"}}, "/upload/compression"),
]


@pytest.mark.parametrize(("body", "place"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_request_is_refused_with_the_place(service: RunningService, body: dict[str, Any], place: str) -> None:
    with unchanged(service):
        problem(service.admin.post("/v1/images", json=body), 422, "invalid-request", place)


def test_bad_requests_for_volumes_and_judgements(service: RunningService, image: dict[str, Any]) -> None:
    with unchanged(service):
        post = service.admin.post
        both = {"image": image["id"], "snapshot": NOWHERE}
        problem(post("/v1/volumes", json=both), 422, "invalid-request", "/image")
        with_checksum = {"image": image["id"], "checksum": DIGEST}
        problem(post("/v1/volumes", json=with_checksum), 422, "invalid-request", "/checksum")
        problem(post("/v1/volumes", json={"image": image["id"], "size": 512 << 10}), 422, "invalid-request", "/size")
        problem(post("/v1/judgements", json={}), 422, "invalid-request", "/reference")
        problem(service.admin.get("/v1/images", params={"state": "ready"}), 422, "invalid-request", "state")
        problem(service.admin.put(f"/v1/images/{image['id']}/pins/-x"), 422, "invalid-request", "name")


def test_a_reference_that_is_none_is_told_by_its_code(service: RunningService) -> None:
    problem(service.admin.post("/v1/images", json={"reference": "nonsense"}), 409, "bad-reference")
    problem(service.admin.post("/v1/images", json={"reference": "http://169.254.169.254/x"}), 409, "address-refused")
    problem(service.admin.post("/v1/volumes", json={"image": "file:///etc/passwd"}), 409, "bad-url")


# ---------------------------------------------------------------- once, twice, not at all


def test_who_asks_at_the_same_time_gets_the_same_operation(who: dict[str, Api], origin: Origin) -> None:
    asked = publish(origin, 2, pause=0.1)
    first = who["owner"].start_operation("/v1/images", **asked)
    assert who["stranger"].start_operation("/v1/images", **asked) == first
    problem(who["asker"].get(f"/v1/operations/{first}"), 404, "operation-not-found")
    assert first in [found["id"] for found in who["stranger"].show("/v1/operations")["items"]]
    left = who["stranger"].post(f"/v1/operations/{first}/cancel", json={})
    assert left.json()["state"] in ("queued", "running")
    ended = who["stranger"].wait_operation(first)
    assert ended["state"] == "succeeded", ended
    assert who["owner"].show(f"/v1/images/{ended['resource']['id']}")["state"] == "available"


def test_a_repeated_request_does_nothing(service: RunningService, origin: Origin) -> None:
    asked, key = publish(origin, 3), {"Idempotency-Key": str(uuid.uuid4()), "Prefer": "wait=30"}
    first = service.admin.post("/v1/images", json=asked, headers=key)
    assert first.status_code == 201, first.text
    with unchanged(service):
        again = service.admin.post("/v1/images", json=asked, headers=key)
    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    other = service.admin.post("/v1/images", json={**asked, "name": "x"}, headers=key)
    problem(other, 422, "idempotency-key-reused")


def test_a_plan_changes_nothing(service: RunningService, image: dict[str, Any]) -> None:
    plan = {"dry_run": "true"}
    upload = {"size": 5, "format": "raw", "checksum": DIGEST}
    with unchanged(service):
        for path, body in (
            ("/v1/images", {"reference": URL}),
            ("/v1/images", {"upload": upload}),
            ("/v1/volumes", {"image": image["id"]}),
            ("/v1/judgements", {"reference": URL}),
        ):
            answer = service.admin.post(path, json=body, params=plan)
            assert (answer.status_code, answer.json()["allowed"]) == (200, True), answer.text
            assert answer.json()["steps"]
        gone = service.admin.delete(f"/v1/images/{image['id']}", params=plan)
        assert gone.json()["steps"][-1] == "delete the record"


def test_a_record_minds_its_version(who: dict[str, Api], origin: Origin) -> None:
    made = who["owner"].post("/v1/images", json=publish(origin, 4), headers={"Prefer": "wait=30"})
    path, tag = f"/v1/images/{made.json()['id']}", made.headers["ETag"]
    changed = who["owner"].patch(path, json={"visibility": "public"}, headers={"If-Match": tag})
    assert (changed.status_code, changed.json()["visibility"]) == (200, "public")
    problem(who["owner"].patch(path, json={"name": "x"}, headers={"If-Match": tag}), 412, "precondition-failed")
    problem(who["owner"].delete(path, headers={"If-Match": tag}), 412, "precondition-failed")
    assert who["stranger"].get(path).json()["reference"] is None
    assert who["owner"].delete(path, headers={"If-Match": changed.headers["ETag"]}).status_code == 204
    problem(who["owner"].get(path), 404, "image-not-found")


def test_filters_and_pages(who: dict[str, Api], image: dict[str, Any]) -> None:
    api = who["owner"]
    for name, value in (("name", "mine"), ("state", "available"), ("digest", image["digest"]), ("owner", "owner")):
        found = api.get("/v1/images", params={name: value}).json()["items"]
        assert image["id"] in [each["id"] for each in found], name
    for name, value in (("name", "other"), ("state", "error"), ("digest", DIGEST), ("owner", "nobody")):
        assert api.get("/v1/images", params={name: value}).json()["items"] == [], name
    assert len(api.get("/v1/images", params={"limit": 1}).json()["items"]) == 1


def test_a_judgement_is_answered_at_once(service: RunningService, origin: Origin) -> None:
    asked = publish(origin, 5)
    answer = service.admin.post("/v1/judgements", json=asked, headers={"Prefer": "wait=30"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["passed"]["checksums"] == {"sha256": asked["checksum"]}
    assert answer.json()["refused"] == []
    assert service.admin.get("/v1/images", params={"name": "nothing"}).json()["items"] == []


def test_a_volume_tells_its_image(service: RunningService, image: dict[str, Any]) -> None:
    made = service.admin.post("/v1/volumes", json={"image": image["id"]}, headers={"Prefer": "wait=30"})
    assert made.status_code == 201, made.text
    assert made.json()["origin"] == {"kind": "image", "id": image["id"]}
    assert made.json()["size"] == MIB
    service.admin.delete(f"/v1/volumes/{made.json()['id']}")
