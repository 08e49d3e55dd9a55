"""A stand-in for the service: a real HTTP server that answers as it was told and keeps what it was asked."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

VOLUME = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
SNAPSHOT = "33333333-3333-4333-8333-333333333333"
ATTACHMENT = "44444444-4444-4444-8444-444444444444"
OPERATION = "55555555-5555-4555-8555-555555555555"
INITIATOR = "iqn.2004-10.org.example:host7"
IMAGE = "66666666-6666-4666-8666-666666666666"
PASSWORD = "s3cret-chap-pass"


@dataclass(frozen=True)
class Reply:
    """One answer: its JSON (or raw text or bytes), headers, seconds to think; `drop` closes the connection instead,
    and `cut` does after so many bytes."""

    status: int = 200
    document: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0
    drop: bool = False
    cut: int | None = None


@dataclass(frozen=True)
class Request:
    """`body` is decoded JSON; bytes of another kind are as they came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


Respond = Callable[[Request], Reply]


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scheme = "http"
        self.requests: list[Request] = []
        self._replies: dict[tuple[str, str], list[Reply | Respond]] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def on(self, method: str, path: str, *replies: Reply | Respond) -> None:
        """Answer such requests with `replies`, or what they return, in turn, and with the last one from then on."""
        self._replies[method, path] = list(replies)

    def reply(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            replies = self._replies.get((request.method, request.path))
            if not replies:
                return problem(404, "not-found", "there is no such thing")
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        return reply if isinstance(reply, Reply) else reply(request)

    def asked(self, method: str, path: str) -> list[Request]:
        return [each for each in self.requests if (each.method, each.path) == (method, path)]

    def use_tls(self, certificate: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "https"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        binary = self.headers.get("Content-Type", "") in ("application/octet-stream", "application/xml")
        body = raw if binary else json.loads(raw) if raw else None
        reply = self.server.reply(Request(self.command, parts.path, query, dict(self.headers), body))
        time.sleep(reply.after)
        if reply.drop:
            self.close_connection = True
            return
        content = _encoded(reply.document)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: reply.cut])
        self.close_connection |= reply.cut is not None

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output to itself."""


def _encoded(document: Any) -> bytes:
    if isinstance(document, bytes):
        return document
    return (document if isinstance(document, str) else "" if document is None else json.dumps(document)).encode()


@contextmanager
def stand_in(certificate: Path | None = None) -> Iterator[StandIn]:
    with StandIn() as server:
        if certificate is not None:
            server.use_tls(certificate)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def problem(status: int, code: str, detail: str = "it cannot be", **more: Any) -> Reply:
    """A refusal; a 503 may be repeated at once, so that tests need not wait for it."""
    document = {"type": "about:blank", "title": "Refused", "status": status, "code": code, "detail": detail, **more}
    return Reply(status, {**document, "instance": "/"}, {"Content-Type": "application/problem+json"})


def volume(**more: Any) -> dict[str, Any]:
    return {
        "id": VOLUME,
        "name": "results",
        "size": 10 << 30,
        "state": "available",
        "error": None,
        "owner": "alice",
        "visibility": "private",
        "pool": "default",
        "origin": None,
        "serial": "abc",
        "created_at": "2026-01-02T03:04:05Z",
        "updated_at": "2026-01-02T03:04:05Z",
        "attachments": [],
        **more,
    }


def snapshot(**more: Any) -> dict[str, Any]:
    kept = {key: volume()[key] for key in ("size", "state", "error", "owner", "pool", "created_at")}
    return {"id": SNAPSHOT, "name": "before", "volume_id": VOLUME, **kept, **more}


def attachment(**more: Any) -> dict[str, Any]:
    return {
        "id": ATTACHMENT,
        "volume_id": VOLUME,
        "instance_id": "direct",
        "node": "host7",
        "initiator": INITIATOR,
        "mode": "rw",
        "state": "attached",
        "direct": True,
        "error": None,
        "created_at": "2026-01-02T03:04:05Z",
        **more,
    }


def connection() -> dict[str, Any]:
    auth = {"username": "u-1", "password": PASSWORD, "mutual_username": None, "mutual_password": None}
    return {"driver": "iscsi", "portal": "127.0.0.1:3260", "target": "iqn.2026-01.test:v", "lun": 1, "auth": auth}


def image(content: bytes = b"", **more: Any) -> dict[str, Any]:
    """An image whose file is `content`."""
    return {
        "id": IMAGE,
        "name": "debian",
        "state": "available",
        "error": None,
        "owner": "alice",
        "visibility": "private",
        "origin": {"kind": "reference"},
        "reference": "https://images.example.org/debian-12.qcow2",
        "identifier": None,
        "digest": hashlib.sha256(content).hexdigest(),
        "size": 10 << 30,
        "file_size": len(content),
        "allocated": len(content),
        "source_format": "qcow2",
        "source_digests": {},
        "title": "Debian 12",
        "os": "debian",
        "endorser": "jane.tester@example.org",
        "pins": 0,
        "used_at": "2026-01-02T03:04:05Z",
        "created_at": "2026-01-02T03:04:05Z",
        "updated_at": "2026-01-02T03:04:05Z",
        **more,
    }


def ranges(content: bytes, *, cut: int | None = None, validator: str | None = None) -> Respond:
    """Answers with `content`, or the rest of it that was asked for, under its digest or another `validator`."""
    tag = f'"{validator or hashlib.sha256(content).hexdigest()}"'

    def respond(request: Request) -> Reply:
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if asked is None or request.headers.get("If-Range", tag) != tag:
            return Reply(200, content, headers, cut=cut)
        start = int(asked[1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Reply(206, content[start:], {**headers, "Content-Range": span}, cut=cut)

    return respond


def operation(state: str = "running", progress: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "id": OPERATION,
        "kind": "create-volume",
        "state": state,
        "progress": progress,
        "message": None,
        "error": None,
        "resource": {"kind": "volume", "id": VOLUME},
        "created_at": "2026-01-02T03:04:05Z",
        **more,
    }


def accepted(**more: Any) -> Reply:
    return Reply(202, operation(**more), {"Location": f"/v1/operations/{OPERATION}", "Retry-After": "1"})


def plan(*conflicts: tuple[str, str]) -> dict[str, Any]:
    listed = [{"code": code, "detail": detail} for code, detail in conflicts]
    steps = ["reserve 10 GiB", "create the file"]
    return {
        "dry_run": True,
        "allowed": not conflicts,
        "steps": steps,
        "conflicts": listed,
        "quota": None,
        "space": None,
    }
