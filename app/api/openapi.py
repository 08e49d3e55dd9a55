"""The OpenAPI 3.1 description, made from the same declarations that route and validate."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api.contract import PATH_TYPES, Operation
from app.schemas import IdempotencyKey, Plan, ProblemDocument

REF = "#/components/schemas/{model}"
PROBLEM = {"$ref": "#/components/responses/problem"}
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
            "responses": {"problem": _problem(references)},
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
    return described


def _path(operation: Operation) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": PATH_TYPES[name].json_schema()}
        for name in operation.parameters
    ]


def _query(operation: Operation) -> list[dict[str, Any]]:
    if operation.query is None:
        return []
    schema = operation.query.model_json_schema(ref_template=REF)
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": _not_null(member)}
        for name, member in schema["properties"].items()
    ]


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
        key = IdempotencyKey.json_schema()
        headers.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": key})
    if operation.if_match:
        tag = {"type": "string", "pattern": '^"v[0-9]{1,18}"$'}
        headers.append({"name": "If-Match", "in": "header", "required": False, "schema": tag})
    return headers


def _responses(operation: Operation, references: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    answers = {status: [references[model]] if model else [] for status, model in operation.answers.items()}
    if operation.mutation:
        answers.setdefault(200, []).append(references[Plan])
    for status, schemas in answers.items():
        response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
        if schemas:
            schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
            response["content"] = {"application/json": {"schema": schema}}
        links = {link.operation: _link(link) for link in operation.links if link.status == status}
        if links:
            response["links"] = links
        responses[str(status)] = response
    return responses | dict.fromkeys(_refusals(operation), PROBLEM) | {"default": PROBLEM}


def _link(link: Any) -> dict[str, Any]:
    return {"operationId": link.operation, "parameters": {link.parameter: f"$response.body#{link.pointer}"}}


def _refusals(operation: Operation) -> list[str]:
    codes = [] if operation.public else ["401", "403"]
    if operation.parameters:
        codes.append("404")
    if operation.mutation:
        codes.append("409")
    if operation.if_match:
        codes.append("412")
    if operation.body:
        codes += ["400", "413", "415"]
    return [*codes, "422"]
