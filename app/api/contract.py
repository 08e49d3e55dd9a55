"""One declaration per operation: its routing, the parsing of its request, its errors and its OpenAPI description.

A view gets a `Call` that is signed in and validated, and returns an `Answer`. What is declared and what is done cannot
drift apart, since both come from the same models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from uuid import UUID

from flask import Request as FlaskRequest
from flask import Response
from gunicorn.http.errors import ParseException
from pydantic import BaseModel, TypeAdapter, ValidationError
from sqlalchemy.orm import Session
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, UnsupportedMediaType

from app.auth import Caller
from app.errors import FieldProblem, Problem
from app.schemas import DryRun, IdempotencyKey, Label
from app.service import Service
from app.transfers import Line

Model = TypeVar("Model", bound=BaseModel)
#: A weak validator is none here: If-Match compares strongly (RFC 9110 §13.1.1).
ETAG = re.compile(r'"v(\d{1,18})"', re.ASCII)


@dataclass(frozen=True)
class Answer:
    """Status, document (None: no body) and headers of a success."""

    status: int
    document: BaseModel | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        text = "" if self.document is None else self.document.model_dump_json()
        content_type = {} if self.document is None else {"Content-Type": "application/json"}
        return Response(text, self.status, {"Cache-Control": "no-store", **content_type, **self.headers})


@dataclass(frozen=True)
class Operation:
    """An entry of the API: `answers` maps each success to its model, `headers` to the headers it always has.

    `links` says what can follow an answer. `gives_bytes` are the successes whose body is bytes and no document, and
    `takes_bytes` is the length of the longest body of bytes that is taken instead of one: the view reads it itself.
    `request_headers` are those the view heeds beside the usual, `refuses` the refusals it has beside the usual.
    """

    method: str
    rule: str
    view: Callable[[Call], Answer]
    answers: Mapping[int, type[BaseModel] | None]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    tag: str = ""
    public: bool = False
    links: tuple[Link, ...] = ()
    if_match: bool = False
    headers: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    gives_bytes: tuple[int, ...] = ()
    takes_bytes: int | None = None
    request_headers: tuple[str, ...] = ()
    refuses: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.view.__name__

    @property
    def mutation(self) -> bool:
        return self.query is not None and issubclass(self.query, DryRun)

    @property
    def parameters(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.rule)


@dataclass(frozen=True)
class Link:
    """After a success with `status`, `operation` may be called with `parameter` taken from the answer at `pointer`.

    `body` maps members of its request to where the answer has them.
    """

    status: int
    operation: str
    parameter: str | None = "id"
    pointer: str = "/id"
    body: Mapping[str, str] = field(default_factory=dict)


class Routes:
    """The operations of one resource."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.operations: list[Operation] = []

    def add(self, method: str, rule: str, **declared: Any) -> Callable[[Callable[[Call], Answer]], Any]:
        def register(view: Callable[[Call], Answer]) -> Callable[[Call], Answer]:
            self.operations.append(Operation(method, rule, view, tag=self.tag, **declared))
            return view

        return register


#: What a member of a path is, by its name.
PATH_TYPES: dict[str, TypeAdapter[Any]] = {
    "id": TypeAdapter(UUID),
    "name": TypeAdapter(Label),
    "user": TypeAdapter(Label),
}


class Call:
    """One request: signed in, validated, with the way to the database."""

    def __init__(self, service: Service, operation: Operation, request: FlaskRequest, caller: Caller | None) -> None:
        self.service = service
        self.operation = operation
        self.request = request
        self._caller = caller
        #: Set when this request was answered before: what it tells is then told again.
        self.repeated = False
        self.path = {name: _path_value(name, (request.view_args or {})[name]) for name in operation.parameters}
        self.query = self._parse_query()
        self.idempotency_key = self._parse_key() if operation.mutation else None
        self.body = self._parse_body()

    @property
    def caller(self) -> Caller:
        assert self._caller is not None, "a public operation has no caller"
        return self._caller

    @property
    def id(self) -> UUID:
        return self.path["id"]  # type: ignore[no-any-return]

    @property
    def dry_run(self) -> bool:
        return isinstance(self.query, DryRun) and self.query.dry_run

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self.service.database.read() as session:
            yield session

    @cached_property
    def if_match(self) -> int | None:
        """The version the client saw (RFC 9110 §13.1.1), None when it does not care; one that cannot be is -1."""
        value = self.request.headers.get("If-Match")
        if value is None or value.strip() == "*":
            return None
        found = ETAG.fullmatch(value.strip())
        return int(found[1]) if found else -1

    @property
    def wait(self) -> float:
        """Seconds to wait for an operation: `Prefer: wait=N` (RFC 7240 §4.3), at most 30; else the site's."""
        found = re.search(r"\bwait=(\d{1,4})\b", self.request.headers.get("Prefer", ""))
        return min(float(found[1]), 30.0) if found else self.service.settings.server.wait

    def _parse_query(self) -> Any:
        declared = self.operation.query
        given = self.request.args
        for name in given:
            if declared is None or name not in declared.model_fields:
                raise refuse("unknown-parameter", "This operation has no such parameter.", name=name)
            if len(given.getlist(name)) > 1:
                raise refuse("repeated", "Give this parameter once.", name=name)
        return validate(declared, dict(given), body=False) if declared else None

    def _parse_key(self) -> str | None:
        value = self.request.headers.get("Idempotency-Key")
        if value is None:
            return None
        try:
            return IdempotencyKey.validate_python(value)
        except ValidationError as error:
            detail = error.errors()[0]["msg"]
            raise refuse("bad-idempotency-key", detail, name="Idempotency-Key") from None

    def _admit_bytes(self, longest: int) -> None:
        """Look at what is told of a body of bytes; it stays unread."""
        if self.request.mimetype != "application/octet-stream":
            raise Problem(415, "not-bytes", "Send the body as application/octet-stream.")
        if self.request.content_length is None:
            raise Problem(411, "length-required", "Send the body with its Content-Length, not in chunks.")
        if self.request.content_length > longest:
            raise RequestEntityTooLarge

    def _parse_body(self) -> Any:
        declared = self.operation.body
        if self.operation.takes_bytes is not None:
            self._admit_bytes(self.operation.takes_bytes)
        if declared is None:
            return None
        if self.request.mimetype != "application/json":
            raise UnsupportedMediaType("Send the body as application/json.")
        data = self._received()
        # Werkzeug refuses a Content-Length over the limit, and silently cuts a chunked body at it.
        if len(data) >= (self.request.max_content_length or len(data) + 1):
            raise RequestEntityTooLarge
        return validate(declared, _checked_json(data), body=True)

    def _received(self) -> bytes:
        """The body; who sends it slower than any transfer may be is cut off."""
        line = Line(self.request.environ.get("gunicorn.socket"))
        line.begin(self.service.settings.server.idle, self.request.max_content_length or 0)
        try:
            return self.request.get_data()
        except ParseException:
            raise BadRequest("The body's chunks are malformed (RFC 9112 §7.1).") from None
        finally:
            line.done()


def refuse(
    code: str, detail: str, *, name: str | None = None, pointer: str | None = None, status: int = 422
) -> Problem:
    return Problem(status, "invalid-request", detail, errors=[FieldProblem(code, detail, pointer=pointer, name=name)])


def _path_value(name: str, text: str) -> Any:
    try:
        return PATH_TYPES[name].validate_python(text)
    except ValidationError as error:
        raise refuse(f"bad-{name}", error.errors()[0]["msg"], name=name) from None


def validate(model: type[Model], data: dict[str, Any] | bytes, *, body: bool) -> Model:
    """Problem 422 names every wrong place: by pointer in a body, by name in a query."""
    try:
        return model.model_validate_json(data) if isinstance(data, bytes) else model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    if any(item["type"] == "json_invalid" for item in found):
        raise Problem(400, "malformed-json", found[0]["msg"])
    errors = [_field_problem(item["loc"], item["type"], item["msg"], body=body) for item in found]
    places = ", ".join(e.pointer or e.name or "the body" for e in errors)
    raise Problem(422, "invalid-request", f"Not acceptable: {places}.", errors=errors)


def _field_problem(location: tuple[int | str, ...], code: str, detail: str, *, body: bool) -> FieldProblem:
    if not body:
        return FieldProblem(code, detail, name=".".join(map(str, location)))
    return FieldProblem(code, detail, pointer="".join(f"/{_escaped(part)}" for part in location))


def _escaped(part: object) -> str:
    """A reference token of RFC 6901 §3."""
    return str(part).replace("~", "~0").replace("/", "~1")


# ---------------------------------------------------------------- JSON that means one thing (RFC 8259 §4, I-JSON)


class _Object(dict[str, Any]):
    repeated: str | None = None


@dataclass(frozen=True)
class _Constant:
    """NaN, Infinity and -Infinity: Python reads them, JSON has none."""

    text: str


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        made.repeated = next(name for name in names if names.count(name) > 1)
    return made


def _checked_json(data: bytes) -> bytes:
    """The bytes themselves, if they are JSON without repeated members and numbers that are none; Problem 400."""
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_Constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "malformed-json", f"The body is not JSON: {error}.") from None
    _look_for_flaws(value, "")
    return data


def _look_for_flaws(value: Any, pointer: str) -> None:
    if isinstance(value, _Constant):
        raise refuse("not-a-number", f"{value.text} is not JSON.", pointer=pointer, status=400)
    if isinstance(value, _Object) and value.repeated is not None:
        place = f"{pointer}/{_escaped(value.repeated)}"
        raise refuse("duplicate-member", "This member is there twice.", pointer=place, status=400)
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        _look_for_flaws(member, f"{pointer}/{_escaped(name)}")
