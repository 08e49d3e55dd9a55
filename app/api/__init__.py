"""The HTTP API: a module per resource; a view parses, calls one service function, and returns."""

from __future__ import annotations

import sys
from importlib.metadata import version

from flask import Blueprint, Flask, Request, Response, jsonify, request
from sqlalchemy.exc import IntegrityError, OperationalError, TimeoutError
from werkzeug.exceptions import HTTPException

from app.api import accounts, attachments, content, images, operations, site, snapshots, volumes
from app.api.contract import Call, Operation, Routes
from app.api.openapi import describe
from app.auth import Caller, sign_in
from app.errors import Problem
from app.service import Service
from app.transfers import Line

ROUTES: tuple[Routes, ...] = (
    volumes.routes, attachments.routes, snapshots.routes, images.routes, content.routes, operations.routes,
    accounts.routes, site.routes,
)  # fmt: skip


def install(app: Flask, service: Service) -> None:
    """Route every declared operation, and the description of them all."""
    for routes in ROUTES:
        blueprint = Blueprint(routes.tag, __name__)
        for operation in routes.operations:
            _route(blueprint, service, operation)
        app.register_blueprint(blueprint)
    app.after_request(_leave_nothing_unread)
    document = describe((o for routes in ROUTES for o in routes.operations), version("stratus-storage"))
    app.add_url_rule("/v1/openapi.json", "openapi", lambda: jsonify(document), provide_automatic_options=False)
    app.url_map.merge_slashes = False  # a path is what it is: no redirect in HTML to another one
    app.register_error_handler(Problem, _problem)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(OperationalError, _database_error)
    app.register_error_handler(TimeoutError, _database_error)
    app.register_error_handler(IntegrityError, _integrity_error)
    app.register_error_handler(Exception, _crash)


def _leave_nothing_unread(response: Response) -> Response:
    """What is left of the body of a request that is answered already (401, 404, 422), the server would wait for, in
    threads that others need."""
    size = request.content_length
    if size is None and "Transfer-Encoding" in request.headers:
        size = sys.maxsize
    Line(request.environ.get("gunicorn.socket")).swallow(request.environ["wsgi.input"], size or 0)
    return response


def _route(blueprint: Blueprint, service: Service, operation: Operation) -> None:
    def view(**_: str) -> Response:
        caller = None if operation.public else _signed_in(service, request)
        return operation.view(Call(service, operation, request, caller)).response()

    rule = operation.rule.replace("{", "<").replace("}", ">")
    blueprint.add_url_rule(rule, operation.name, view, methods=[operation.method], provide_automatic_options=False)


def _signed_in(service: Service, request: Request) -> Caller:
    with service.database.read() as session:
        return sign_in(session, request.headers.get("Authorization"), request.remote_addr)


def _problem(problem: Problem) -> Response:
    response = jsonify(problem.document(request.path))
    response.status_code = problem.status
    response.headers.update(
        {**problem.headers, "Content-Type": "application/problem+json", "Cache-Control": "no-store"}
    )
    return response


CODES = {400: "bad-request", 404: "no-such-path", 405: "method-not-allowed", 413: "body-too-large", 415: "not-json"}


def _http_error(error: HTTPException) -> Response:
    """What Flask itself refuses, in our shape and with its headers (Allow)."""
    status = error.code or 500
    headers = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")}
    return _problem(Problem(status, CODES.get(status, "http-error"), error.description or error.name, headers=headers))


def _database_error(_: OperationalError | TimeoutError) -> Response:
    detail = "The database is busy or does not answer; try again."
    return _problem(Problem(503, "database-busy", detail, headers={"Retry-After": "1"}))


def _integrity_error(_: IntegrityError) -> Response:
    detail = "Somebody changed the same thing at the same moment; try again."
    return _problem(Problem(409, "changed-meanwhile", detail, headers={"Retry-After": "1"}))


def _crash(error: Exception) -> Response:
    """The edge of the process: the cause goes to the log, and not to the client."""
    from flask import current_app

    current_app.logger.exception("unhandled", exc_info=error)
    return _problem(Problem(500, "internal-error", "Something went wrong here; the log of the service says what."))
