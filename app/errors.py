"""The one shape of every refusal: RFC 9457 problem details with a stable `code`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus


@dataclass(frozen=True)
class FieldProblem:
    """One wrong place in a request: `pointer` (RFC 6901) into the body, or `name` of a parameter or header."""

    code: str
    detail: str
    pointer: str | None = None
    name: str | None = None


class Problem(Exception):
    """A refusal that a client sees: HTTP `status`, stable `code`, and what to do in `detail`."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase

    def document(self, instance: str) -> dict[str, object]:
        body: dict[str, object] = {
            "type": f"urn:stratus:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "instance": instance,
        }
        if self.errors:
            body["errors"] = [{k: v for k, v in vars(e).items() if v is not None} for e in self.errors]
        return body


def not_found(kind: str, identifier: object) -> Problem:
    """What does not exist and what you may not see are the same answer."""
    return Problem(404, f"{kind}-not-found", f"There is no {kind} {identifier} that you may see.")


def conflict(code: str, detail: str) -> Problem:
    return Problem(409, code, detail)


def forbidden(code: str, detail: str) -> Problem:
    return Problem(403, code, detail)


def invalid(pointer: str, code: str, detail: str) -> Problem:
    """A member of the body that is well-formed and still cannot be accepted."""
    return Problem(422, "invalid-request", detail, errors=[FieldProblem(code, detail, pointer=pointer)])
