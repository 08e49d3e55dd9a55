"""The OpenAPI 3.1 description, made from the same declarations that route and validate."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api.contract import PATH_TYPES, Link, Operation
from app.schemas import IdempotencyKey, Plan, ProblemDocument

REF = "#/components/schemas/{model}"
PROBLEM = {"$ref": "#/components/responses/problem"}
#: A body that is no document (OpenAPI 3.1 leaves the schema of one to its media type; tools want to be told).
BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def describe(operations: Iterable[Operation], version: str) -> dict[str, Any]:
    """The whole document."""
    listed = list(operations)
    schemas, references = _schemas(listed)
    paths: dict[str, dict[str, Any]] = {}
    for operation in listed:
        paths.setdefault(operation.rule, {})[operation.method.lower()] = _described(operation, references)
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": DIALECT,
        "info": {"title": "Stratus storage", "version": version, "license": {"name": "Apache-2.0"}},
        "security": [{"token": []}, {"password": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "password": {"type": "http", "scheme": "basic"},
            },
            "responses": {"problem": _problem(references), "unauthorized": _unauthorized(references)},
        },
    }


def _schemas(operations: list[Operation]) -> tuple[dict[str, Any], dict[type[BaseModel], dict[str, Any]]]:
    requests: set[type[BaseModel]] = {o.body for o in operations if o.body}
    answers: set[type[BaseModel]] = {model for o in operations for model in o.answers.values() if model}
    answers |= {ProblemDocument, Plan}
    wanted = [(model, "validation") for model in sorted(requests, key=_name)]
    wanted += [(model, "serialization") for model in sorted(answers, key=_name)]
    found, definitions = models_json_schema(wanted, ref_template=REF)  # type: ignore[arg-type]
    references = {model: reference for (model, _), reference in found.items()}
    return definitions["$defs"], references  # type: ignore[return-value]


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _problem(references: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": references[ProblemDocument]}}
    return {"description": "Problem details (RFC 9457); `code` is stable", "content": content}


def _unauthorized(references: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    return _problem(references) | {"headers": {"WWW-Authenticate": HEADERS["WWW-Authenticate"] | {"required": True}}}


def _described(operation: Operation, references: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": (operation.view.__doc__ or operation.name).strip().split("\n")[0],
        "tags": [operation.tag],
        "parameters": [*_path(operation), *_query(operation), *_headers(operation)],
        "responses": _responses(operation, references),
    }
    if operation.public:
        described["security"] = []
    if operation.body:
        content = {"application/json": {"schema": references[operation.body]}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.takes_bytes is not None:
        described["requestBody"] = {"required": True, "content": BYTES}
    return described


# ---------------------------------------------------------------- parameters

PATH = {"id": "the resource's id", "name": "the resource's name", "user": "whose: a user's or a node's name"}
ETAG = {"type": "string", "pattern": '^"v[0-9]{1,18}"$'}
KEY = "recognises a repeated request for 24 hours: it is answered again and does nothing"
CONTENT_ETAG = {"type": "string", "pattern": '^"[0-9a-f]{64}"$'}
PREFER = "`wait=SECONDS`, 0 to 30: how long to wait for the end before the answer is 202 (RFC 7240)"
MATCH = "the ETag of the record as you read it: 412 when it has changed since"


def _parameter(place: str, name: str, description: str | None, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    described = {"name": name, "in": place, "required": False, "schema": schema}
    return described | ({"description": description} if description else {}) | more


def _path(operation: Operation) -> list[dict[str, Any]]:
    return [
        _parameter("path", name, PATH[name], PATH_TYPES[name].json_schema(), required=True)
        for name in operation.parameters
    ]


def _query(operation: Operation) -> list[dict[str, Any]]:
    if operation.query is None:
        return []
    schema = operation.query.model_json_schema(ref_template=REF)
    return [
        _parameter("query", name, member.pop("description", None), _not_null(member),
                   required=name in schema.get("required", []))
        for name, member in schema["properties"].items()
    ]  # fmt: skip


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query parameter that may be left out is not one that may be null."""
    kinds: list[dict[str, Any]] = [kind for kind in schema.get("anyOf", []) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return schema
    kept: dict[str, Any] = {k: v for k, v in schema.items() if k not in ("anyOf", "default")}
    return kept | kinds[0]


def _headers(operation: Operation) -> list[dict[str, Any]]:
    headers = []
    if operation.mutation:
        headers.append(_parameter("header", "Idempotency-Key", KEY, IdempotencyKey.json_schema()))
    if operation.if_match:
        headers.append(_parameter("header", "If-Match", MATCH, ETAG, example='"v1"'))
    if 202 in operation.answers:
        headers.append(_parameter("header", "Prefer", PREFER, {"type": "string"}, example="wait=10"))
    return headers + [_parameter("header", name, **REQUEST_HEADERS[name]) for name in operation.request_headers]


#: Of bodies that are bytes (RFC 9110).
REQUEST_HEADERS: dict[str, dict[str, Any]] = {
    "Content-Range": {
        "description": "`bytes FIRST-LAST/SIZE`: which bytes of all of them these are, the last one counted (§14.4)",
        "schema": {"type": "string", "pattern": "^bytes [0-9]{1,18}-[0-9]{1,18}/[0-9]{1,18}$"},
        "required": True,
        "example": "bytes 0-4/1048576",
    },
    "Range": {
        "description": "one range of bytes; of several, or others, nothing is heeded (§14.2)",
        "schema": {"type": "string"},
        "example": "bytes=0-1048575",
    },
    "If-Range": {
        "description": "heed Range only if this still is the ETag (§13.1.5)",
        "schema": {"type": "string"},
        "example": f'"{64 * "0"}"',
    },
    "If-Match": {
        "description": "412 if the ETag is none of these (§13.1.1)",
        "schema": {"type": "string"},
        "example": "*",
    },
    "If-None-Match": {
        "description": "304 if the ETag is one of these (§13.1.2)",
        "schema": {"type": "string"},
        "example": f'"{64 * "0"}"',
    },
}

# ---------------------------------------------------------------- answers

HEADERS: dict[str, dict[str, Any]] = {
    "ETag": {"description": "the version of the record, for If-Match", "schema": ETAG},
    "Location": {"description": "where the record is", "schema": {"type": "string", "format": "uri-reference"}},
    "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 0}},
    "WWW-Authenticate": {"description": "how to sign in", "schema": {"type": "string"}},
}
CONTENT_HEADERS: dict[str, dict[str, Any]] = HEADERS | {
    "ETag": {"description": "the SHA-256 of the whole, which never changes", "schema": CONTENT_ETAG},
    "Accept-Ranges": {"description": "`bytes`", "schema": {"type": "string", "const": "bytes"}},
    "Content-Range": {"description": "which bytes of how many", "schema": {"type": "string"}},
    "Content-Disposition": {"description": "a name for the file", "schema": {"type": "string"}},
    "Repr-Digest": {"description": "`sha-256=:BASE64:` of the whole (RFC 9530)", "schema": {"type": "string"}},
}
#: Where every operation that is not done yet can be followed.
WATCH = (Link(202, "get_operation"), Link(202, "cancel_operation"))


def _responses(operation: Operation, references: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    answers = {status: [references[model]] if model else [] for status, model in operation.answers.items()}
    if operation.mutation:
        answers.setdefault(200, []).append(references[Plan])
    responses: dict[str, Any] = {
        str(status): _response(operation, status, schemas) for status, schemas in answers.items()
    }
    responses |= dict.fromkeys(_refusals(operation), PROBLEM)
    if not operation.public:
        responses["401"] = {"$ref": "#/components/responses/unauthorized"}
    return responses | {"default": PROBLEM}


def _response(operation: Operation, status: int, schemas: list[dict[str, Any]]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if schemas:
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        response["content"] = {"application/json": {"schema": schema}}
    if status in operation.gives_bytes:
        response["content"] = BYTES
    names = ("Location", "Retry-After") if status == 202 else operation.headers.get(status, ())
    if names:
        always = status != 200 or not operation.mutation  # a plan is no record and has no version
        known = CONTENT_HEADERS if operation.gives_bytes else HEADERS
        response["headers"] = {name: known[name] | {"required": always} for name in names}
    links = {link.operation: _link(link) for link in (*operation.links, *WATCH) if link.status == status}
    return response | ({"links": links} if links else {})


def _link(link: Link) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": link.operation}
    if link.parameter:
        described["parameters"] = {link.parameter: f"$response.body#{link.pointer}"}
    if link.body:
        described["requestBody"] = {name: f"$response.body#{pointer}" for name, pointer in link.body.items()}
    return described


def _refusals(operation: Operation) -> list[str]:
    codes = [] if operation.public else ["403"]
    if operation.parameters:
        codes.append("404")
    if operation.mutation:
        codes.append("409")
    if operation.if_match:
        codes.append("412")
    if operation.body:
        codes += ["400", "413", "415"]
    if operation.takes_bytes is not None:
        codes += ["411", "413", "415"]
    return [*codes, "422", *map(str, operation.refuses)]
