"""/v1/images/{id}/content and /v1/images/{id}/upload: the bytes of images, out and in"""

from __future__ import annotations

import base64
import errno
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flask import Response
from werkzeug.wsgi import wrap_file

from app import images, uploads
from app.api.contract import Answer, Call, Routes, refuse
from app.api.mutation import operation_document
from app.errors import Problem
from app.models import Image
from app.notify import WORK
from app.schemas import OperationDocument, UploadStatus
from app.transfers import Line, Sending, receiving
from app.uploads import PIECE, Piece

routes = Routes("content")

#: Read at a time where sendfile(2) cannot be used (TLS).
BLOCK = 1 << 20
#: One range, of bytes (RFC 9110 §14.1.2).
RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?", re.ASCII | re.IGNORECASE)
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
SHOWN = ("ETag", "Accept-Ranges", "Content-Disposition", "Repr-Digest")


@dataclass(frozen=True)
class Bytes(Answer):
    """A success whose body is bytes, in what the server knows how to send; with None, none are sent by us."""

    body: Iterable[bytes] | None = None

    def response(self) -> Response:
        # Of an empty list, and not of b"", the length that a HEAD tells is not put right.
        return Response(self.body or [], self.status, dict(self.headers), direct_passthrough=self.body is not None)


# ---------------------------------------------------------------- out


@routes.add("GET", "/v1/images/{id}/content", answers={200: None, 206: None, 304: None}, gives_bytes=(200, 206),
            headers={200: SHOWN, 206: (*SHOWN, "Content-Range"), 304: ("ETag",)}, refuses=(409, 412, 416, 503),
            request_headers=("Range", "If-Range", "If-Match", "If-None-Match"))  # fmt: skip
def get_image_content(call: Call) -> Answer:
    """Read an image: the bytes of its qcow2 file, all or a range of them."""
    with call.read() as session:
        image = images.find(session, call.caller, call.id)
    if image.state != "available" or image.digest is None:
        raise images.not_available(image)
    headers = _headers(image, image.digest)
    given = call.request.headers
    if "If-Match" in given and not call.request.if_match.contains(image.digest):
        raise images.changed("image's content")
    if call.request.if_none_match.contains_weak(image.digest):
        return Bytes(304, headers={"ETag": headers["ETag"], "Cache-Control": headers["Cache-Control"]})
    prefix = call.service.settings.images.accel_prefix
    if prefix is not None and "If-Match" not in given:  # nginx would look for it at an ETag of its own
        return _by_nginx(call, image, f"{prefix}{image.digest}.qcow2", headers)
    return _by_us(call, image, headers)


def _headers(image: Image, digest: str) -> dict[str, str]:
    name = UNSAFE.sub("-", image.name or "").strip(".-") or str(image.id)
    return {
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f'attachment; filename="{name.removesuffix(".qcow2")}.qcow2"',
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
        "Cache-Control": "private, no-cache",
    }


def _by_nginx(call: Call, image: Image, path: str, headers: dict[str, str]) -> Bytes:
    if call.request.method == "GET":
        _note(call, 0, (image.file_size or 0) - 1)
    del headers["Accept-Ranges"]  # nginx says so itself
    return Bytes(200, headers=headers | {"X-Accel-Redirect": path})


def _by_us(call: Call, image: Image, headers: dict[str, str]) -> Bytes:
    with ExitStack() as undo:
        file = undo.enter_context(_open(call.service.settings.image_path(image.digest or ""), image))
        size = os.fstat(file.fileno()).st_size
        first, last = _range(call, headers["ETag"], size) or (0, size - 1)
        headers["Content-Length"] = str(last + 1 - first)
        if call.request.method == "HEAD":
            return Bytes(200, headers=headers)
        if last + 1 - first < size:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        call.service.downloads.take(call.caller.id)
        undo.callback(call.service.downloads.give_back, call.caller.id)
        _note(call, first, last)
        undo.pop_all()
        return Bytes(206 if "Content-Range" in headers else 200, headers=headers, body=_sent(call, file, first, last))


def _open(path: Path, image: Image) -> BinaryIO:
    """The file, which stays readable whatever becomes of its name; Problem 404 when there is none, or not all of it."""
    gone = Problem(404, "image-not-cached", f"The bytes of image {image.id} are not here any more: ask for it anew.")
    try:
        file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))  # noqa: SIM115
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise gone from None
    if os.fstat(file.fileno()).st_size != image.file_size:
        file.close()
        raise gone
    return file


def _range(call: Call, etag: str, size: int) -> tuple[int, int] | None:
    """First and last byte of the range that is asked for, None for all; Problem 416 when there are no such bytes."""
    request = call.request
    found = RANGE.fullmatch(request.headers.get("Range", "").strip())
    if found is None or found.groups() == (None, None) or request.method != "GET":
        return None
    if request.headers.get("If-Range", etag).strip() != etag:
        return None
    if found[1] is None:
        first, last = max(0, size - int(found[2])), size - 1
    else:
        first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
        if found[2] is not None and int(found[2]) < first:
            return None  # no range at all
    if first >= size:
        detail = f"The image has {size} bytes."
        raise Problem(416, "range-not-satisfiable", detail, headers={"Content-Range": f"bytes */{size}", "ETag": etag})
    return first, last


def _sent(call: Call, file: BinaryIO, first: int, last: int) -> Iterable[bytes]:
    environ, size = call.request.environ, last + 1 - first
    line = Line(environ.get("gunicorn.socket"))
    line.begin(call.service.settings.server.idle, size)
    sending: Any = Sending(file, first, size, line, call.service.downloads, call.caller.id)
    return wrap_file(environ, sending, BLOCK)


def _note(call: Call, first: int, last: int) -> None:
    with call.service.database.write() as session:
        images.read_content(session, call.caller, call.id, first, last)


# ---------------------------------------------------------------- in


@routes.add("GET", "/v1/images/{id}/upload", answers={200: UploadStatus}, refuses=(409,))
def get_upload(call: Call) -> Answer:
    """Show how much of an image that is being uploaded is here."""
    with call.read() as session:
        return _status(uploads.find(session, call.caller, call.id))


@routes.add("PUT", "/v1/images/{id}/upload", answers={200: UploadStatus, 202: OperationDocument}, takes_bytes=PIECE,
            request_headers=("Content-Range",), refuses=(400, 408, 409, 503))  # fmt: skip
def put_upload(call: Call) -> Answer:
    """Send the next piece of an image; with the last one begins what makes an image of them."""
    service, environ = call.service, call.request.environ
    size = call.request.content_length or 0
    line = Line(environ.get("gunicorn.socket"))
    idle = service.settings.server.idle
    with receiving(service.uploads, call.caller.id, line, environ["wsgi.input"], size, idle) as read:
        with call.read() as session:
            image = uploads.find(session, call.caller, call.id)
        piece = _piece(call, image, size)
        image, operation = uploads.receive(service.database, service.settings, call.caller, call.id, piece, read)
    if operation is None:
        return _status(image)
    service.bus.announce(WORK, operation.lane)
    headers = {"Location": f"/v1/operations/{operation.id}", "Retry-After": "1"}
    return Answer(202, operation_document(operation), headers)


def _status(image: Image) -> Answer:
    return Answer(200, UploadStatus(received=image.received, size=uploads.size_of(image)))


def _piece(call: Call, image: Image, size: int) -> Piece:
    """What Content-Range says, if it can be so; Problem 422 otherwise."""
    found = CONTENT_RANGE.fullmatch(call.request.headers.get("Content-Range", "").strip())
    piece = Piece(*map(int, found.groups())) if found else None
    if piece is None or not piece.first <= piece.last < piece.total:
        raise refuse("bad-content-range", "Say `bytes FIRST-LAST/SIZE`, the last one counted.", name="Content-Range")
    if piece.total != uploads.size_of(image):
        detail = f"The image was announced with {uploads.size_of(image)} bytes."
        raise refuse("other-size", detail, name="Content-Range")
    if piece.size != size:
        raise refuse("other-length", "Content-Length and Content-Range do not agree.", name="Content-Length")
    return piece
