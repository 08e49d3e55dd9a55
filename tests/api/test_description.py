"""The OpenAPI description: sound in itself, and every link in it leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests

from app import api, worker
from iscsi.names import BadName, validate_initiator
from tests.api.support import MIB, initiator
from tests.support.service import Api, RunningService

ROOT = Path(__file__).parents[2]
METHODS = ("get", "put", "post", "delete", "patch")


@pytest.fixture(scope="module")
def description(service: RunningService) -> dict[str, Any]:
    answer = requests.get(service.base + "/v1/openapi.json", timeout=30)
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json()  # type: ignore[no-any-return]


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in description["paths"].items():
        for method in METHODS:
            if method in found:
                yield method, path, found[method]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_it_is_openapi_3_1_and_refers_to_what_is_there(description: dict[str, Any]) -> None:
    assert description["openapi"].startswith("3.1.")
    for reference in references(description):
        node: Any = description
        for word in reference.removeprefix("#/").split("/"):
            node = node[word]
    for name, schema in description["components"]["schemas"].items():
        assert jsonschema_rs.meta.is_valid(schema), name


def test_every_operation_is_told_in_full(description: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(description)]
    assert len(names) == len(set(names))
    for method, path, operation in operations(description):
        assert operation["summary"], (method, path)
        assert operation["responses"]["default"] == {"$ref": "#/components/responses/problem"}
        if operation.get("security") != []:
            assert operation["responses"]["401"] == {"$ref": "#/components/responses/unauthorized"}
        for parameter in operation["parameters"]:
            assert parameter["description"], (path, parameter)


def test_no_keyword_is_made_up(description: dict[str, Any]) -> None:
    """A bound under a name that JSON Schema does not have bounds nothing."""
    known = {
        "$ref", "type", "properties", "required", "additionalProperties", "items", "anyOf", "allOf", "not", "enum",
        "const", "minimum", "maximum", "multipleOf", "minLength", "maxLength", "maxItems", "pattern", "format", "title",
        "description", "default", "examples",
    }  # fmt: skip

    def check(schema: Any, place: str) -> None:
        assert set(schema) <= known, (place, set(schema) - known)
        for name, member in schema.get("properties", {}).items():
            check(member, f"{place}/{name}")
        for keyword in ("anyOf", "allOf"):
            for part in schema.get(keyword, []):
                check(part, place)

    for name, schema in description["components"]["schemas"].items():
        check(schema, name)
    for _, path, operation in operations(description):
        for parameter in operation["parameters"]:
            check(parameter["schema"], f"{path} {parameter['name']}")


@pytest.mark.parametrize(
    "name",
    [
        "iqn.2026-11.org.example", "iqn.2026-11.org.example:a", "iqn.2026-11.o-r-g.example:a.b-c:d",
        "iqn.2026-00.org.example",
        "iqn.2026-11.org", "iqn.2026-11.-org.example", "iqn.2026-11.org-.example", "iqn.2026-11.org.example:",
        "iqn.2026-11.org.example:a_b", "eui.02004567a425678d", "eui.02004567a425678", "naa.52004567ba64678d",
        "naa.62004567ba64678d0123456789abcdef", "naa.62004567ba64678d0123456789abcde", "nqn.2026-11.org.example",
        "iqn.2026-11.a.b", "iqn.2026-11.a..b",
    ],
)  # fmt: skip
def test_the_pattern_of_an_initiator_says_what_is_checked(description: dict[str, Any], name: str) -> None:
    schema = description["components"]["schemas"]["NodeCreate"]["properties"]["initiator"]
    try:
        validate_initiator(name)
        accepted = True
    except BadName:
        accepted = False
    assert jsonschema_rs.is_valid(schema, name) is accepted


# ---------------------------------------------------------------- links


class Walker:
    """Makes one thing of each kind by its own operation, and follows every link of the answer."""

    def __init__(self, api: Api, description: dict[str, Any]) -> None:
        self._api = api
        self._by_name = {o["operationId"]: (m, p, o) for m, p, o in operations(description)}
        self.followed: set[tuple[str, str]] = set()

    def follow_from(self, name: str, made: requests.Response) -> None:
        _, _, operation = self._by_name[name]
        links = operation["responses"][str(made.status_code)].get("links", {})
        for link in sorted(links.values(), key=lambda link: self._by_name[link["operationId"]][0] == "delete"):
            self._follow(name, link, made.json())

    def _follow(self, source: str, link: dict[str, Any], document: dict[str, Any]) -> None:
        name = link["operationId"]
        method, path, _ = self._by_name[name]
        given = {k: self._value(expression, document) for k, expression in link.get("parameters", {}).items()}
        body = {k: self._value(expression, document) for k, expression in link.get("requestBody", {}).items()}
        answer = self._api.request(method, path.format(**given), json=REST.get(name, {}) | body, params=QUERY.get(name))
        assert answer.status_code < 300, (source, name, answer.text)
        assert answer.request.url
        self.followed.add((source, name))

    @staticmethod
    def _value(expression: str, document: Any) -> Any:
        assert expression.startswith("$response.body#/")
        for word in expression.removeprefix("$response.body#/").split("/"):
            document = document[word]
        return document


#: What an operation needs beside what a link tells it.
REST: dict[str, dict[str, Any]] = {
    "create_attachment": {"instance_id": "i", "node": "n", "initiator": initiator("link"), "mode": "ro"},
    "share_volume": {"group": "linked"},
    "update_group": {"members": []},
}
QUERY = {"unshare_volume": {"group": "linked"}, "delete_attachment": {"force": "false"}}


def test_every_link_can_be_followed(service: RunningService, description: dict[str, Any]) -> None:
    admin, walker = service.admin, Walker(service.admin, description)
    admin.post("/v1/groups", json={"name": "linked"})
    walker.follow_from("create_user", admin.post("/v1/users", json={"name": "u"}))
    walker.follow_from("create_node", admin.post("/v1/nodes", json={"name": "n", "initiator": initiator("n")}))
    walker.follow_from("create_group", admin.post("/v1/groups", json={"name": "g"}))
    walker.follow_from("create_token", admin.post("/v1/tokens", json={}))
    volume = admin.make_volume(MIB)["id"]
    snapshots = f"/v1/volumes/{volume}/snapshots"
    walker.follow_from("create_snapshot", admin.post(snapshots, json={}))
    attach = {"instance_id": "i", "node": "n", "initiator": initiator("walk"), "mode": "ro"}
    walker.follow_from("create_attachment", admin.post(f"/v1/volumes/{volume}/attachments", json=attach))
    walker.follow_from("create_image", admin.post("/v1/images", json={"volume": volume}, headers={"Prefer": "wait=30"}))
    _follow_from_a_volume(admin, walker)
    at_once = {source for source, _ in walker.followed}
    declared = {
        (operation["operationId"], link["operationId"])
        for _, _, operation in operations(description)
        for status, response in operation["responses"].items()
        for link in response.get("links", {}).values()
        if status == "201"
    }
    assert walker.followed == declared
    assert at_once == {"create_user", "create_node", "create_group", "create_token", "create_volume", "create_snapshot",
                       "create_attachment", "create_image"}  # fmt: skip


def _follow_from_a_volume(admin: Api, walker: Walker) -> None:
    """Deleting comes last, and what is attached cannot be deleted: the attachment made on the way ends in between."""
    made = admin.post("/v1/volumes", json={"size": MIB})
    links = walker._by_name["create_volume"][2]["responses"]["201"]["links"]
    for name in sorted(links, key=lambda name: (name.startswith("delete"), name == "unshare_volume")):
        if name == "delete_volume":
            for attachment in admin.get(
                "/v1/attachments", params={"volume": made.json()["id"], "state": "attached"}
            ).json()["items"]:
                admin.detach(attachment["id"])
        walker._follow("create_volume", links[name], made.json())


def test_what_is_not_done_yet_links_to_its_operation(service: RunningService, description: dict[str, Any]) -> None:
    walker = Walker(service.admin, description)
    volume = service.admin.make_volume(MIB)["id"]
    started = service.admin.post("/v1/volumes", json={"volume": volume}, headers={"Prefer": "wait=0"})
    assert started.status_code == 202
    walker.follow_from("create_volume", started)
    assert walker.followed == {("create_volume", "get_operation"), ("create_volume", "cancel_operation")}
    for _, path, operation in operations(description):
        if "202" in operation["responses"]:
            assert set(operation["responses"]["202"]["links"]) == {"get_operation", "cancel_operation"}, path


# ---------------------------------------------------------------- the guide

CODE = re.compile(
    r"""(?: (?:conflict|forbidden|_unauthorized)\(\s* | Problem\(\d{3},\s* | \bcode\s=\s ) "([a-z-]+)" """,
    re.VERBOSE,
)


def codes() -> set[str]:
    """Every code a problem can have, as the sources say."""
    text = "\n".join(file.read_text() for file in ROOT.glob("app/**/*.py"))
    found = set(CODE.findall(text)) | {f"{kind}-not-found" for kind in re.findall(r'not_found\("([a-z]+)"', text)}
    return (
        found
        | {code for _, code in worker.CODES}
        | set(api.CODES.values())
        | {"clone-needs-detach", "snapshot-needs-detach"}
    )


def test_the_guide_tells_every_code_and_every_path(description: dict[str, Any]) -> None:
    guide = (ROOT / "docs" / "api.md").read_text()
    assert len(codes()) > 60
    assert {code for code in codes() if f"`{code}`" not in guide} == set()
    assert {path for path in description["paths"] if path not in guide} == set()
