"""What is wrong with a request is said by code and place, and nothing comes of it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from tests.api.support import MIB, NOWHERE, initiator, problem, query, unchanged
from tests.support.contents import Raw
from tests.support.service import Api, RunningService

LARGEST_BODY = 256 * 1024


@dataclass
class Site:
    service: RunningService
    alice: Api
    volume: str
    snapshot: str
    operation: str


@pytest.fixture(scope="module")
def site(service: RunningService) -> Site:
    alice = service.user("alice")
    volume = alice.make_volume(MIB, name="hers")["id"]
    snapshot = alice.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    operation = alice.get("/v1/operations").json()["items"][0]["id"]
    return Site(service, alice, volume, snapshot, operation)


@pytest.fixture(autouse=True)
def nothing_changes(service: RunningService, site: Site) -> Iterator[None]:
    with unchanged(service):
        yield


def send(
    api: Api, method: str, path: str, body: bytes, content_type: str | None = "application/json"
) -> requests.Response:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return api.request(method, path, data=body, headers=headers)


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(("token", "status"), [(None, 400), ("Bearer nobody's", 401)])
def test_chunks_that_are_none_are_the_clients_fault(site: Site, token: str | None, status: int) -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    signed = {} if token is None else {"Authorization": token}
    with closing(Raw(site.alice, "POST", "/v1/volumes", headers | signed)) as sender:
        sender.send(b"no chunk\r\n")
        assert sender.status() == status
        assert sender.ended()


GOOD = b'{"size": 1048576}'
NOT_JSON = {
    "empty": b"",
    "cut off": b'{"size": 1',
    "two documents": b"{} {}",
    "invalid UTF-8": b'{"size": 1048576, "name": "\xff\xfe"}',
    "UTF-16": GOOD.decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "lone surrogate": rb'{"size": 1048576, "name": "\ud800"}',
    "raw control character": b'{"size": 1048576, "name": "a\nb"}',
    "trailing comma": b'{"size": 1048576,}',
    "number of 5000 digits": b'{"size": ' + b"9" * 5000 + b"}",
    "nested 100000 deep": b"[" * 100_000,
    "nested and closed": b'{"name":' * 1000 + b"1" + b"}" * 1000,
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_not_json(site: Site, body: bytes) -> None:
    problem(send(site.alice, "POST", "/v1/volumes", body), 400, "malformed-json")


@pytest.mark.parametrize("depth", range(50, 1100, 75))
def test_nesting_is_refused_at_every_depth(site: Site, depth: int) -> None:
    """Whichever reader gives up first: the answer is a refusal."""
    answer = send(site.alice, "POST", "/v1/volumes", b'{"size": 1048576, "name": ' + b"[" * depth + b"]" * depth + b"}")
    assert answer.status_code in (400, 422)
    problem(answer, answer.status_code, "malformed-json" if answer.status_code == 400 else "invalid-request")


@pytest.mark.parametrize(
    ("body", "place", "code"),
    [
        (b'{"size": 1048576, "size": 2097152}', "/size", "duplicate-member"),
        (b'{"size": 1048576, "a/b~": [{"c": 1, "c": 1}]}', "/a~1b~0/0/c", "duplicate-member"),
        (b'{"size": NaN}', "/size", "not-a-number"),
        (b'{"size": Infinity}', "/size", "not-a-number"),
        (b'{"size": 1048576, "name": [-Infinity]}', "/name/0", "not-a-number"),
    ],
)
def test_json_that_means_two_things_or_nothing(site: Site, body: bytes, place: str, code: str) -> None:
    document = problem(send(site.alice, "POST", "/v1/volumes", body), 400, "invalid-request", place)
    assert document["errors"][0]["code"] == code


VOLUME: list[tuple[Any, str]] = [
    ({"size": "1048576"}, "/size"),
    ({"size": True}, "/size"),
    ({"size": MIB + 0.5}, "/size"),
    ({"size": [MIB]}, "/size"),
    ({"size": -MIB}, "/size"),
    ({"size": 0}, "/size"),
    ({"size": MIB - 1}, "/size"),
    ({"size": (64 << 40) + 512}, "/size"),
    ({"size": (1 << 50) + 512}, "/size"),
    ({"size": 10**400}, "/size"),
    ({"size": 1e300}, "/size"),
    ({}, "/size"),
    ({"size": None}, "/size"),
    ({"size": MIB, "colour": "red"}, "/colour"),
    ({"size": MIB, "": 1}, "/"),
    ({"size": MIB, "name": ""}, "/name"),
    ({"size": MIB, "name": "x" * 129}, "/name"),
    ({"size": MIB, "name": "a\0b"}, "/name"),
    ({"size": MIB, "name": "a\nb"}, "/name"),
    ({"size": MIB, "name": "a\n"}, "/name"),
    ({"size": MIB, "name": "\x1b[31m"}, "/name"),
    ({"size": MIB, "name": "a\x85b"}, "/name"),
    ({"size": MIB, "name": 7}, "/name"),
    ({"size": MIB, "visibility": "secret"}, "/visibility"),
    ({"size": MIB, "visibility": None}, "/visibility"),
    ({"size": MIB, "pool": "../default"}, "/pool"),
    ({"snapshot": "not-a-uuid"}, "/snapshot"),
    ({"snapshot": 5}, "/snapshot"),
    ({"volume": "01890000-0000-7000-8000-00000000000"}, "/volume"),
    ({"snapshot": NOWHERE, "volume": NOWHERE}, "/snapshot"),
]


@pytest.mark.parametrize(("body", "place"), VOLUME)
def test_a_volume_that_cannot_be(site: Site, body: Any, place: str) -> None:
    problem(site.alice.post("/v1/volumes", json=body), 422, "invalid-request", place)


@pytest.mark.parametrize("body", [[], "text", 5, None, True])
def test_a_body_that_is_no_object(site: Site, body: Any) -> None:
    answer = send(site.alice, "POST", "/v1/volumes", json.dumps(body).encode())
    problem(answer, 422, "invalid-request", "")


ATTACHMENT = {"instance_id": "i-1", "node": "n-1", "initiator": initiator("a"), "mode": "rw"}
BAD_NAMES = [
    "", "iqn", "iqn.", "iqn.2026-11", "iqn.2026-11.", "iqn.2026-11.org", "iqn.2026-13.org.example:a",
    "iqn.26-11.org.example:a", "iqn.2026-11.org.example:a b", "iqn.2026-11.org.example:a_b",
    "iqn.2026-11.org..example:a",
    "iqn.2026-11.org.example:ü", "iqn.2026-11.org.example:a\n", "iqn.2026-11.org.example:" + "a" * 200,
    "eui.02004567A425678", "naa.52004567BA64678D0", "wwn.52004567BA64678D", " iqn.2026-11.org.example:a",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_no_initiator(site: Site, name: str) -> None:
    attach = site.alice.post(f"/v1/volumes/{site.volume}/attachments", json={**ATTACHMENT, "initiator": name})
    assert problem(attach, 422, "invalid-request", "/initiator")["errors"][0]["code"] == "bad-initiator"
    node = site.service.admin.post("/v1/nodes", json={"name": "n-1", "initiator": name})
    assert problem(node, 422, "invalid-request", "/initiator")["errors"][0]["code"] == "bad-initiator"


OTHERS: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/volumes/{volume}/attachments", {**ATTACHMENT, "mode": "rx"}, "/mode"),
    ("POST", "/v1/volumes/{volume}/attachments", {**ATTACHMENT, "mutual_chap": "yes"}, "/mutual_chap"),
    ("POST", "/v1/volumes/{volume}/attachments", {**ATTACHMENT, "instance_id": "a\x7fb"}, "/instance_id"),
    ("POST", "/v1/volumes/{volume}/attachments", {"node": "n", "initiator": initiator("a")}, "/instance_id"),
    ("POST", "/v1/volumes/{volume}/revert", {"snapshot": "latest"}, "/snapshot"),
    ("POST", "/v1/volumes/{volume}/revert", {}, "/snapshot"),
    ("POST", "/v1/volumes/{volume}/snapshots", {"size": MIB}, "/size"),
    ("PATCH", "/v1/volumes/{volume}", {"size": 0}, "/size"),
    ("PATCH", "/v1/volumes/{volume}", {"visibility": None}, "/visibility"),
    ("PATCH", "/v1/volumes/{volume}", {"owner": "bob"}, "/owner"),
    ("PUT", "/v1/volumes/{volume}/shares", {"group": "no such"}, "/group"),
    ("PUT", "/v1/volumes/{volume}/shares", {"group": "g", "mode": "w"}, "/mode"),
    ("POST", "/v1/tokens", {"expires_in": 59}, "/expires_in"),
    ("POST", "/v1/tokens", {"expires_in": 10**10}, "/expires_in"),
    ("POST", "/v1/tokens", {"description": "a\tb"}, "/description"),
    ("POST", "/v1/users", {"name": "a/b"}, "/name"),
    ("POST", "/v1/users", {"name": "-a"}, "/name"),
    ("POST", "/v1/users", {"name": "a", "role": "node"}, "/role"),
    ("POST", "/v1/users", {"name": "a", "password": "too short"}, "/password"),
    ("PATCH", "/v1/users/alice", {"enabled": 1}, "/enabled"),
    ("POST", "/v1/groups", {"name": "a" * 65}, "/name"),
    ("PUT", "/v1/groups/g", {"members": ["alice", "b\0b"]}, "/members/1"),
    ("PUT", "/v1/groups/g", {"members": "alice"}, "/members"),
    ("PUT", "/v1/groups/g", {"members": ["a"] * 1001}, "/members"),
    ("PUT", "/v1/quotas/alice", {"size": -1}, "/size"),
    ("PUT", "/v1/quotas/alice", {"count": 10**9}, "/count"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "place"), OTHERS)
def test_other_bodies(site: Site, method: str, path: str, body: Any, place: str) -> None:
    answer = site.service.admin.request(method, path.format(volume=site.volume), json=body)
    problem(answer, 422, "invalid-request", place)


def test_every_wrong_place_is_named_at_once(site: Site) -> None:
    answer = site.alice.post("/v1/volumes", json={"size": 1, "name": "", "colour": 1})
    problem(answer, 422, "invalid-request", "/size")
    assert {error["pointer"] for error in answer.json()["errors"]} == {"/size", "/name", "/colour"}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", None])
def test_another_content_type(site: Site, kind: str | None) -> None:
    problem(send(site.alice, "POST", "/v1/volumes", GOOD, kind), 415, "not-json")


def test_a_body_that_is_too_long(site: Site) -> None:
    answer = send(site.alice, "POST", "/v1/volumes", b" " * LARGEST_BODY + GOOD)
    problem(answer, 413, "body-too-large")


def test_a_body_that_is_too_long_and_does_not_say_so(site: Site) -> None:
    pieces = (b" " * 65536 for _ in range(5))
    answer = site.alice.post("/v1/volumes", data=pieces, headers={"Content-Type": "application/json"})
    assert answer.request.headers["Transfer-Encoding"] == "chunked"
    problem(answer, 413, "body-too-large")


# ---------------------------------------------------------------- paths, parameters, headers

PARAMETERS: list[tuple[str, str, str]] = [
    ("GET", "/v1/volumes/not-a-uuid", "id"),
    ("DELETE", "/v1/volumes/5", "id"),
    ("GET", "/v1/attachments/%00", "id"),
    ("GET", "/v1/users/%ff", "name"),
    ("GET", "/v1/users/a%20b", "name"),
    ("GET", "/v1/quotas/a%0Ab", "user"),
    ("GET", "/v1/volumes?limit=0", "limit"),
    ("GET", "/v1/volumes?limit=1001", "limit"),
    ("GET", "/v1/volumes?limit=many", "limit"),
    ("GET", "/v1/volumes?limit=", "limit"),
    ("GET", "/v1/volumes?limit=5&limit=6", "limit"),
    ("GET", "/v1/volumes?size=5", "size"),
    ("GET", "/v1/volumes?LIMIT=5", "LIMIT"),
    ("GET", "/v1/volumes?state=sleeping", "state"),
    ("GET", "/v1/volumes?name=a%00b", "name"),
    ("GET", "/v1/volumes?owner=a/b", "owner"),
    ("GET", "/v1/volumes?next=x", "next"),
    ("GET", "/v1/volumes?next=AAAAAAAAAAAAAAAAAAAAAB", "next"),
    ("GET", "/v1/volumes?next=AAAAAAAAAAAAAAAAAAAAA%2B", "next"),
    ("GET", "/v1/whoami?verbose=true", "verbose"),
    ("GET", "/v1/snapshots?volume=5", "volume"),
    ("GET", "/v1/events?resource=5", "resource"),
    ("GET", "/v1/operations/{operation}?wait=nan", "wait"),
    ("GET", "/v1/operations/{operation}?wait=inf", "wait"),
    ("GET", "/v1/operations/{operation}?wait=-1", "wait"),
    ("GET", "/v1/operations/{operation}?wait=31", "wait"),
    ("DELETE", "/v1/volumes/{volume}?dry_run=perhaps", "dry_run"),
    ("DELETE", "/v1/volumes/{volume}?force=true", "force"),
    ("DELETE", "/v1/volumes/{volume}?dry_run=false&dry_run=false", "dry_run"),
    ("DELETE", "/v1/volumes/{volume}/shares", "group"),
]


@pytest.mark.parametrize(("method", "path", "name"), PARAMETERS)
def test_parameters(site: Site, method: str, path: str, name: str) -> None:
    path = path.format(volume=site.volume, operation=site.operation)
    problem(site.service.admin.request(method, path), 422, "invalid-request", name)


@pytest.mark.parametrize("key", ["short", "x" * 256, "with a space", "tab\tinside", "k\xfcmlaut-key"])
def test_keys_that_are_none(site: Site, key: str) -> None:
    headers = {"Idempotency-Key": key.encode("latin-1")}
    answer = site.alice.delete(f"/v1/volumes/{site.volume}", headers=headers)
    problem(answer, 422, "invalid-request", "Idempotency-Key")


@pytest.mark.parametrize(
    "tag", ['"v0"', '"v999999999999999999"', '"v99999999999999999999999"', "v1", '"x"', "", '"v\u0661"']
)
def test_if_match_that_does_not_match(site: Site, tag: str) -> None:
    for path in (f"/v1/volumes/{site.volume}", f"/v1/snapshots/{site.snapshot}"):
        answer = site.alice.delete(path, headers={"If-Match": tag.encode()})
        problem(answer, 412, "precondition-failed")


def test_a_weak_tag_never_matches(site: Site) -> None:
    """RFC 9110 §13.1.1: If-Match compares strongly."""
    current = site.alice.get(f"/v1/volumes/{site.volume}").headers["ETag"]
    answer = site.alice.delete(f"/v1/volumes/{site.volume}", headers={"If-Match": f"W/{current}"})
    problem(answer, 412, "precondition-failed")


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/v1/volumes/{nowhere}", None, "volume-not-found"),
        ("DELETE", "/v1/volumes/{nowhere}", None, "volume-not-found"),
        ("PATCH", "/v1/volumes/{nowhere}", {"name": "x"}, "volume-not-found"),
        ("POST", "/v1/volumes/{nowhere}/attachments", ATTACHMENT, "volume-not-found"),
        ("POST", "/v1/volumes/{nowhere}/snapshots", {}, "volume-not-found"),
        ("POST", "/v1/volumes/{nowhere}/revert", {"snapshot": NOWHERE}, "volume-not-found"),
        ("POST", "/v1/volumes/{volume}/revert", {"snapshot": NOWHERE}, "snapshot-not-found"),
        ("GET", "/v1/volumes/{nowhere}/shares", None, "volume-not-found"),
        ("PUT", "/v1/volumes/{volume}/shares", {"group": "none"}, "group-not-found"),
        ("DELETE", "/v1/volumes/{volume}/shares?group=none", None, "share-not-found"),
        ("POST", "/v1/volumes", {"volume": NOWHERE}, "volume-not-found"),
        ("POST", "/v1/volumes", {"snapshot": NOWHERE}, "snapshot-not-found"),
        ("POST", "/v1/volumes", {"size": MIB, "pool": "none"}, "pool-not-found"),
        ("GET", "/v1/snapshots/{nowhere}", None, "snapshot-not-found"),
        ("DELETE", "/v1/snapshots/{nowhere}", None, "snapshot-not-found"),
        ("GET", "/v1/attachments/{nowhere}", None, "attachment-not-found"),
        ("GET", "/v1/attachments/{nowhere}/connection", None, "attachment-not-found"),
        ("DELETE", "/v1/attachments/{nowhere}", None, "attachment-not-found"),
        ("GET", "/v1/operations/{nowhere}", None, "operation-not-found"),
        ("POST", "/v1/operations/{nowhere}/cancel", {}, "operation-not-found"),
        ("GET", "/v1/users/nobody", None, "user-not-found"),
        ("PATCH", "/v1/users/nobody", {"enabled": False}, "user-not-found"),
        ("DELETE", "/v1/users/nobody", None, "user-not-found"),
        ("GET", "/v1/nodes/alice", None, "node-not-found"),
        ("PATCH", "/v1/nodes/nobody", {"enabled": False}, "node-not-found"),
        ("GET", "/v1/groups/none", None, "group-not-found"),
        ("PUT", "/v1/groups/none", {"members": []}, "group-not-found"),
        ("DELETE", "/v1/groups/none", None, "group-not-found"),
        ("GET", "/v1/quotas/nobody", None, "user-not-found"),
        ("POST", "/v1/tokens", {"user": "nobody"}, "user-not-found"),
        ("DELETE", "/v1/tokens/{nowhere}", None, "token-not-found"),
        ("GET", "/v1/nothing", None, "no-such-path"),
        ("GET", "/v1/volumes/", None, "no-such-path"),
        ("GET", "/v1//volumes", None, "no-such-path"),
        ("GET", "/", None, "no-such-path"),
    ],
)
def test_what_is_not_there(site: Site, method: str, path: str, body: Any, code: str) -> None:
    path = path.format(nowhere=NOWHERE, volume=site.volume)
    problem(site.service.admin.request(method, path, json=body, allow_redirects=False), 404, code)


# ---------------------------------------------------------------- methods


def test_methods_that_are_not_there_are_refused_with_those_that_are(site: Site) -> None:
    paths = requests.get(site.service.base + "/v1/openapi.json", timeout=30).json()["paths"]
    for path, operations in paths.items():
        declared = {name.upper() for name in operations}
        there = declared | ({"HEAD"} if "GET" in declared else set())
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - there:
            answer = site.alice.request(method, path.replace("{", "").replace("}", ""))
            assert answer.status_code == 405, (method, path)
            assert set(answer.headers["Allow"].split(", ")) == there, (method, path)
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert method == "HEAD" or answer.json()["code"] == "method-not-allowed"


@pytest.mark.parametrize("path", ["/v1/volumes", "/v1/volumes/{volume}", "/healthz", "/v1/openapi.json"])
def test_head_is_get_without_its_body(site: Site, path: str) -> None:
    path = path.format(volume=site.volume)
    get, head = site.alice.get(path), site.alice.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == str(len(get.content))
    assert head.headers.get("ETag") == get.headers.get("ETag")


def test_expectations_of_http_are_kept_for_a_raw_client(site: Site) -> None:
    """A client that sends no Accept and no User-Agent, and asks for a connection to end."""
    connection = http.client.HTTPConnection("127.0.0.1", site.service.port, timeout=30)
    connection.putrequest("GET", "/v1/whoami", skip_accept_encoding=True)
    connection.putheader("Authorization", str(site.alice.headers["Authorization"]))
    connection.putheader("Connection", "close")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 200
    assert json.loads(answer.read())["name"] == "alice"
    connection.close()


def test_the_database_is_looked_at(site: Site) -> None:
    """The comparison that every test here ends with would see a row."""
    assert len(query(site.service, "SELECT * FROM volumes")) == 1
