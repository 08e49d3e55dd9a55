"""A web server on loopback that has images, and every fault that real ones have, on command.

    with Origin() as origin:
        resource = origin.put("/image.raw", content, breaks=[600])   # the first answer ends after 600 bytes
        fetch(origin.url("/image.raw"))
        assert origin.served("/image.raw") == len(content)

Faults can also be changed while it serves: `resource.etag = '"two"'`, `origin.stop()`, `origin.start()`.
"""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

PIECE = 64 << 10


@dataclass
class Resource:
    """What a path answers.

    `breaks`: offsets in the content; each answer in turn ends its connection there, without a farewell, and those after
    the last are well. `statuses`: likewise, codes answered instead of the content. `length`: the Content-Length told,
    if it is to be a lie; 0 and `close_delimited`: none is told. `pause`: seconds before each piece of `piece` bytes.
    `at`: called with the offset before each piece. `location`: a redirect to there, with every status of `statuses`
    used up. `ignores_range` answers 200 with everything, always; `wrong_range` a 206 that begins elsewhere;
    `ignores_if_range` a range of whatever the content is now.
    """

    content: bytes
    etag: str | None = '"one"'
    content_type: str = "application/octet-stream"
    breaks: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    length: int | None = None
    close_delimited: bool = False
    pause: float = 0.0
    piece: int = PIECE
    at: Callable[[int], object] = lambda offset: None
    location: str | None = None
    ignores_range: bool = False
    ignores_if_range: bool = False
    wrong_range: bool = False


class Origin:
    """Serves from `start` to `stop`, and again, at one port of 127.0.0.1. `requests` are the paths and headers seen."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._resources: dict[str, Resource] = {}
        self._served: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0

    def put(self, path: str, content: bytes, **faults: object) -> Resource:
        resource = self._resources[path] = Resource(content, **faults)  # type: ignore[arg-type]
        return resource

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def served(self, path: str) -> int:
        """Bytes of bodies that were handed to the kernel for this path, over all answers."""
        return self._served[path]

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of each request for this path."""
        return [headers for seen, headers in self.requests if seen == path]

    def start(self) -> Self:
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Nobody listens any more, and every connection is cut."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def resource(self, path: str) -> Resource | None:
        return self._resources.get(path.partition("?")[0])

    def count(self, path: str, size: int) -> None:
        with self._lock:
            self._served[path] += size


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], origin: Origin) -> None:
        self.origin = origin
        self.connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def cut(self) -> None:
        for connection in list(self.connections):
            cut(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may go whenever they like."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Tests look at `requests` instead."""

    def do_GET(self) -> None:
        self.close_connection = True
        origin, resource = self.server.origin, self.server.origin.resource(self.path)
        origin.requests.append((self.path, dict(self.headers)))
        if resource is None:
            return self._only(404)
        if resource.statuses:
            return self._only(resource.statuses.pop(0))
        if resource.location is not None:
            return self._only(302, {"Location": resource.location})
        self._answer(resource)

    def _only(self, status: int, headers: dict[str, str] | None = None) -> None:
        body = f"{status}\n".encode()
        self._head(status, {**(headers or {}), "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _answer(self, resource: Resource) -> None:
        size, start = len(resource.content), self._start(resource)
        headers = {"Content-Type": resource.content_type, "ETag": resource.etag}
        if not resource.close_delimited:
            headers["Content-Length"] = str(size - (start or 0) if resource.length is None else resource.length)
        if start is None:
            self._head(200, headers)
        elif start >= size:
            return self._only(416, {"Content-Range": f"bytes */{size}"})
        else:
            told = start + 1 if resource.wrong_range else start
            self._head(206, {**headers, "Content-Range": f"bytes {told}-{size - 1}/{size}"})
        self._body(resource, start or 0)

    def _start(self, resource: Resource) -> int | None:
        """Where the range that was asked for begins; None when all is to be sent: RFC 9110, 13.2.2 and 14.2."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        changed = condition is not None and condition != resource.etag and not resource.ignores_if_range
        return None if asked is None or changed or resource.ignores_range else int(asked[1])

    def _head(self, status: int, headers: dict[str, str | None] | dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _body(self, resource: Resource, start: int) -> None:
        content = resource.content
        end = resource.breaks.pop(0) if resource.breaks else len(content)
        for offset in range(start, end, resource.piece):
            resource.at(offset)
            time.sleep(resource.pause)
            piece = content[offset : min(offset + resource.piece, end)]
            self.wfile.write(piece)
            self.server.origin.count(self.path, len(piece))
        if end < len(content):
            cut(self.connection)


def cut(connection: socket.socket) -> None:
    """The other side has what was sent, and then no more."""
    with suppress(OSError):  # it was faster
        connection.shutdown(socket.SHUT_RDWR)
