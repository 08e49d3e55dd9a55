"""Images whose bytes a test chose, and clients that do not behave."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from uuid import UUID

from sqlalchemy import select

from app.db import Database
from app.models import User
from tests.support import rows
from tests.support.service import Api, RunningService, wait_until

OCTETS = "application/octet-stream"


def plant(service: RunningService, data: bytes, owner: str = "admin", **values: Any) -> UUID:
    """An image with these bytes as its file, in the cache and in the database as the worker leaves one."""
    digest = hashlib.sha256(data).hexdigest()
    directory = service.home / "images" / "images"
    wait_until((service.home / "images" / ".stratus-cache").exists, what="the cache of images")
    path = directory / f"{digest}.qcow2"
    if not path.exists():
        path.write_bytes(data)
        path.chmod(0o444)
    known = {"digest": digest, "file_size": len(data), "size": len(data), "allocated": len(data), "name": "planted"}
    with closing(Database(f"sqlite:///{service.home}/stratus.db")) as database, database.write() as session:
        owner_id = session.scalars(select(User.id).where(User.name == owner)).one()
        image = rows.image(owner_id, **(known | values))
        session.add(image)
        session.flush()
        return image.id


class Raw:
    """A request sent byte by byte over a connection of its own, whose answer is read when the test wants it."""

    def __init__(
        self, api: Api, method: str, path: str, headers: Mapping[str, str] | None = None, *, buffer: int = 4096
    ) -> None:
        host, port = api.base.removeprefix("http://").split(":")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)  # before connecting: it bounds the window
        self._socket.settimeout(60)
        self._socket.connect((host, int(port)))
        given = {"Host": host, "Authorization": str(api.headers["Authorization"]), **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
        self.send("\r\n".join(lines).encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, size: int) -> bytes:
        return self._socket.recv(size)

    def status(self) -> int:
        """Of the answer, when it has begun; 0 when the connection ended instead."""
        try:
            head = self.receive(12)
        except ConnectionError:
            return 0
        return int(head.split()[1]) if head else 0

    def ended(self) -> bool:
        """Whether the service has ended the connection, after all that it had sent is read."""
        try:
            while self.receive(1 << 20):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self._socket.close()


def uploading(first: int, size: int, total: int) -> dict[str, str]:
    """The headers of a piece."""
    span = f"bytes {first}-{first + size - 1}/{total}"
    return {"Content-Type": OCTETS, "Content-Range": span, "Content-Length": str(size)}


def announce(api: Api, data: bytes, format: str = "raw", **values: Any) -> str:
    """An image that is going to be `data`, uploaded; its id."""
    told = {"size": len(data), "checksum": hashlib.sha256(data).hexdigest(), "format": format, **values}
    answer = api.post("/v1/images", json={"upload": told})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])
