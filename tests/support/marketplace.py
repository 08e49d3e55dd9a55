"""A small Marketplace, and files beside it: an HTTP server on loopback, as real as a client needs it.

GET  /metadata/?id=ID  ?location=URL   the entries that say so, in <metadata>; 404 when there are none
GET  /metadata/ID[/ENDORSER[/DATE]]    the same
POST /metadata/                        an entry as application/rdf+xml or application/xml: 201, Location
GET  anything else                     what was published or redirected there
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from imagecache.entries import Entry
from imagecache.errors import BadMetadata
from imagecache.metadata import parse


@dataclass
class Marketplace:
    """`url` is what a site configures. `asked` are the paths and queries of all requests, in order."""

    url: str
    documents: list[bytes] = field(default_factory=list)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def add(self, document: bytes) -> str:
        """Keep an entry; its own URL. Raises BadMetadata."""
        (entry,) = parse(document, "upload", None)
        self.documents.append(document)
        assert entry.created_at is not None
        return f"{self.url}/metadata/{entry.identifier}/{entry.endorser}/{entry.created_at:%Y-%m-%dT%H:%M:%SZ}"

    def publish(self, path: str, body: bytes, content_type: str = "application/octet-stream") -> str:
        """A file at `path`; its URL."""
        self.files[path] = (content_type, body)
        return f"{self.url}{path}"

    def redirect(self, path: str, target: str) -> str:
        self.redirects[path] = target
        return f"{self.url}{path}"

    def found(self, path: str, query: str) -> list[bytes]:
        """The documents that are asked for: by the query, or by the words of the path."""
        words = [word for word in path.removeprefix("/metadata").split("/") if word]
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        return [document for document in self.documents if _is_meant(parse(document, "kept", None)[0], words, asked)]


def _is_meant(entry: Entry, words: list[str], asked: dict[str, str]) -> bool:
    created = f"{entry.created_at:%Y-%m-%dT%H:%M:%SZ}" if entry.created_at else None
    said = [entry.identifier, entry.endorser, created]
    return (
        all(word == own for word, own in zip(words, said, strict=False))
        and asked.get("id", entry.identifier) == entry.identifier
        and ("location" not in asked or asked["location"] in entry.locations)
    )


@contextmanager
def marketplace() -> Iterator[Marketplace]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    host, port = server.server_address[:2]
    server.state = Marketplace(f"http://{host!s}:{port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.state  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        state, parts = self._state(), urlsplit(self.path)
        state.asked.append(self.path)
        if parts.path in state.redirects:
            self._answer(302, b"", "text/plain", state.redirects[parts.path])
        elif parts.path in state.files:
            content_type, body = state.files[parts.path]
            self._file(body, content_type)
        elif parts.path.startswith("/metadata") and (found := state.found(parts.path, parts.query)):
            listed = b"".join(document.partition(b"?>")[2] or document for document in found)
            self._answer(200, b"<metadata>" + listed + b"</metadata>", "application/xml")
        else:
            self._answer(404, b"no metadata matching query found", "text/plain")

    def do_POST(self) -> None:
        state = self._state()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get_content_type() not in ("application/rdf+xml", "application/xml"):
            return self._answer(415, b"", "text/plain")
        try:
            return self._answer(201, b"metadata entry created", "text/plain", state.add(body))
        except (BadMetadata, ValueError) as error:
            return self._answer(400, f"invalid metadata: {error}".encode(), "text/plain")

    def _file(self, body: bytes, content_type: str) -> None:
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes=") or not body:
            return self._answer(200, body, content_type)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last or len(body)), len(body) - 1)
        return self._answer(206, body[int(first) : end + 1], content_type, size=f"bytes {first}-{end}/{len(body)}")

    def _answer(self, status: int, body: bytes, content_type: str, location: str = "", size: str = "") -> None:
        self.send_response(status)
        for name, value in (("Content-Type", content_type), ("Location", location), ("Content-Range", size)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _state(self) -> Marketplace:
        state: Marketplace = self.server.state  # type: ignore[attr-defined]
        return state

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""
