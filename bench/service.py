"""A whole service to measure, as `stratus-storage serve` runs it, and a client as thin as one can be."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from app.config import Settings, load
from app.worker_process import tgt_host

INITIATOR = "iqn.2004-10.com.example:bench"


class Unexpected(Exception):
    """The service answered something else than the benchmark needs to go on."""

    def __init__(self, method: str, path: str, status: int, text: bytes) -> None:
        super().__init__(f"{method} {path}: {status} {text.decode(errors='replace')}")
        self.status = status


class Api:
    """One keep-alive connection with one token. Not for two threads at once."""

    #: The server closes a connection that was idle for two seconds: ours are made anew before that.
    IDLE = 1.0

    def __init__(self, port: int, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Prefer": "wait=30"}
        self._used = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def call(self, method: str, path: str, body: Any = None, *, expect: int = 200) -> Any:
        """The answer's document (None when it has none). Raises Unexpected for another status than `expect`."""
        text = None if body is None else json.dumps(body)
        if time.monotonic() - self._used > self.IDLE:
            self._connection.close()
        self._connection.request(method, path, text, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        self._used = time.monotonic()
        if answer.status != expect:
            raise Unexpected(method, path, answer.status, content)
        return json.loads(content) if content else None

    def create_volume(self, size: int, **body: Any) -> str:
        return str(self.call("POST", "/v1/volumes", {"size": size, **body}, expect=201)["id"])

    def attach(self, volume: str) -> dict[str, Any]:
        wanted = {"instance_id": "bench", "node": "bench", "initiator": INITIATOR, "mode": "rw"}
        attachment: dict[str, Any] = self.call("POST", f"/v1/volumes/{volume}/attachments", wanted, expect=201)
        return attachment

    def detach(self, attachment: str) -> None:
        self.call("DELETE", f"/v1/attachments/{attachment}", expect=204)

    def delete_volume(self, volume: str) -> None:
        self.call("DELETE", f"/v1/volumes/{volume}", expect=204)


class Service:
    """A service that answers at `port` until the block of `running` ends."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.environment = home, environment
        self.port, self._portal_port = free_port(), free_port()
        #: Of `stratus-storage serve`.
        self.pid = 0

    @property
    def settings(self) -> Settings:
        return load(self.home, environ={**os.environ, **self.environment})

    @property
    def admin_token(self) -> str:
        return (self.home / "admin.token").read_text().strip()

    def api(self, token: str | None = None) -> Api:
        """A new connection; the admin's when no token is given."""
        return Api(self.port, token or self.admin_token)

    def user_token(self, name: str) -> str:
        """The token of a new user."""
        with self.api() as admin:
            admin.call("POST", "/v1/users", {"name": name}, expect=201)
            return str(admin.call("POST", "/v1/tokens", {"user": name}, expect=201)["token"])

    def argv(self) -> list[str]:
        listen = ["--listen", f"127.0.0.1:{self.port}", "--portal", f"127.0.0.1:{self._portal_port}"]
        return [sys.executable, "-m", "app.cli", "serve", "--home", str(self.home), *listen]

    def wait_ready(self, process: subprocess.Popen[bytes], timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service does not start: {(self.home / 'serve.out').read_text()}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            with Api(self.port, "") as anybody:
                anybody.call("GET", "/readyz")
        except (OSError, http.client.HTTPException, Unexpected):
            return False
        return True


@contextmanager
def running(home: Path, **environment: str) -> Iterator[Service]:
    """A service with its state in `home` and STRATUS_… settings of `environment`; gone with its target afterwards."""
    service = Service(home, {"STRATUS_ATTACHMENTS__DIRECT": "true", **environment})
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.out").open("wb") as out:
        process = subprocess.Popen(service.argv(), env={**os.environ, **service.environment}, stdout=out, stderr=out)
    service.pid = process.pid
    try:
        service.wait_ready(process)
        yield service
    finally:
        _end(process, home)


def _end(process: subprocess.Popen[bytes], home: Path) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        tgt_host(load(home)).daemon.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
