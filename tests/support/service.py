"""A whole service for a test: `stratus-storage serve` with everything it runs, on loopback and ports of its own."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from click.testing import CliRunner, Result

from app.cli import main as stratus_storage
from tests.support.initiator import Initiator

BIN = Path(sys.executable).parent
#: Settings of all services that are made from now on; the tests in the test kernel have theirs on LIO by it.
EVERYWHERE: dict[str, str] = {}


def free_port() -> int:
    """Below the range the kernel takes for connections (ip_local_port_range): none of those gets it first."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_until(condition: Any, timeout: float = 20.0, what: str = "it") -> Any:
    """The first true value of `condition()`; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        time.sleep(0.02)


class Api(requests.Session):
    """Requests to the service with one token; `cacert` is what it trusts, for https."""

    def __init__(self, base: str, token: str | None, cacert: Path | None = None) -> None:
        super().__init__()
        self.base = base
        self.trust_env = False
        if cacert:
            self.verify = str(cacert)
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def request(self, method: Any, url: Any, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", 60)
        return super().request(method, self.base + str(url), *args, **kwargs)

    def make_volume(self, size: int = 64 << 20, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/volumes", json={"size": size, **body})
        assert answer.status_code == 201, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def attach(self, volume: str, initiator: str, mode: str = "rw", **body: Any) -> dict[str, Any]:
        wanted = {"instance_id": "test", "node": "test", "initiator": initiator, "mode": mode, **body}
        answer = self.post(f"/v1/volumes/{volume}/attachments", json=wanted)
        assert answer.status_code == 201, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def show(self, path: str) -> dict[str, Any]:
        """The record at `path`."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def start_operation(self, path: str, method: str = "POST", **body: Any) -> str:
        """Ask for long work without waiting for it; the operation's id."""
        answer = self.request(method, path, json=body or None, headers={"Prefer": "wait=0"})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait_operation(self, identifier: str, timeout: float = 120) -> dict[str, Any]:
        """The operation when it has ended."""
        ended = ("succeeded", "failed", "cancelled")

        def look() -> dict[str, Any] | None:
            found = self.show(f"/v1/operations/{identifier}")
            return found if found["state"] in ended else None

        return wait_until(look, timeout, f"the end of operation {identifier}")  # type: ignore[no-any-return]

    def events(self, kind: str | None = None, resource: str | None = None) -> list[dict[str, Any]]:
        """The audit trail, the newest first (admin)."""
        wanted = {"kind": kind, "resource": resource, "limit": 1000}
        answer = self.get("/v1/events", params={k: v for k, v in wanted.items() if v is not None})
        assert answer.status_code == 200, answer.text
        return answer.json()["items"]  # type: ignore[no-any-return]

    def detach(self, attachment: str, **params: Any) -> None:
        answer = self.delete(f"/v1/attachments/{attachment}", params=params, headers={"Prefer": "wait=30"})
        assert answer.status_code == 204, answer.text


def initiator_of(attachment: dict[str, Any]) -> Initiator:
    """The initiator of an attachment as `Api.attach` returned it."""
    connection = attachment["connection"]
    auth = connection["auth"]
    mutual = (auth["mutual_username"], auth["mutual_password"]) if auth.get("mutual_username") else None
    return Initiator(
        connection["portal"], connection["target"], attachment["initiator"],
        auth["username"], auth["password"], mutual, connection["lun"],
    )  # fmt: skip


class RunningService:
    """`environment`: STRATUS_… settings; `arguments`: further options of serve. Ports are chosen once and kept.

    With `cacert`, it is spoken to by https; the certificate and key are for `arguments` to name.
    """

    def __init__(
        self,
        home: Path,
        environment: dict[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        cacert: Path | None = None,
    ) -> None:
        self.home = home
        self.cacert = cacert
        self.port, self.portal_port = free_port(), free_port()
        self.portal = f"127.0.0.1:{self.portal_port}"
        self.base = f"{'https' if cacert else 'http'}://127.0.0.1:{self.port}"
        self.environment = {
            "STRATUS_ATTACHMENTS__DIRECT": "true",
            "STRATUS_WORKER__LEASE": "3",
            "STRATUS_SERVER__PROCESSES": "2",
            # A kernel has one LIO, and two services in it need different prefixes.
            "STRATUS_ISCSI__IQN_PREFIX": f"iqn.2026-11.org.example.service-{zlib.crc32(str(home).encode()):08x}",
            **EVERYWHERE,
            **(environment or {}),
        }
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------ life

    def start(self, *, ready: bool = True) -> RunningService:
        argv = [str(BIN / "stratus-storage"), "serve", "--home", str(self.home)]
        argv += ["--listen", f"127.0.0.1:{self.port}", "--portal", self.portal, *self.arguments]
        self.home.parent.mkdir(parents=True, exist_ok=True)
        with (self.home.parent / f"{self.home.name}.out").open("ab") as out:
            self.process = subprocess.Popen(argv, env={**os.environ, **self.environment}, stdout=out, stderr=out)
        if ready:
            wait_until(self.is_ready, 120, f"the service in {self.home}")
        return self

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}: {self.output()}"
        try:
            return Api(self.base, None, self.cacert).get("/readyz", timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    def output(self) -> str:
        return (self.home.parent / f"{self.home.name}.out").read_text()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(90)

    def restart(self) -> RunningService:
        assert self.stop() == 0
        return self.start()

    def pids(self, word: str = "") -> list[int]:
        """Living processes of this home (zombies are dead) whose command line contains `word`."""
        return [pid for pid, line in _command_lines() if _is_ours(pid, line, self.home) and word in line]

    def worker_pid(self) -> int:
        return wait_until(lambda: next(iter(self.pids("app.cli worker")), None), what="the worker")  # type: ignore[no-any-return]

    def serving(self) -> list[int]:
        """Who serves, and goes on when all others end: tgtd, and for LIO no process at all."""
        return [] if self.environment.get("STRATUS_ISCSI__TARGET") == "lio" else [self.tgtd_pid()]

    def tgtd_pid(self) -> int:
        return wait_until(lambda: next(iter(self.pids("tgtd -f")), None), what="tgtd")  # type: ignore[no-any-return]

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def kill_everything(self) -> None:
        """A power cut as far as processes go: supervisor first, so that nothing is started again."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        for _ in range(50):
            left = self.pids()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.02)

    def backing(self, volume: str) -> Path:
        """The file of a volume in the pool of the home."""
        return self.home / "pool" / "volumes" / f"{volume}.raw"

    # ------------------------------------------------------------ clients

    @property
    def admin_token(self) -> str:
        return (self.home / "admin.token").read_text().strip()

    @property
    def admin(self) -> Api:
        return Api(self.base, self.admin_token, self.cacert)

    def attached(self, initiator: str, size: int = 64 << 20, **body: Any) -> tuple[dict[str, Any], Initiator]:
        """A new volume's attachment (`body`: mode, mutual_chap, …), and its initiator."""
        attachment = self.admin.attach(self.admin.make_volume(size)["id"], initiator, **body)
        return attachment, initiator_of(attachment)

    def user(self, name: str) -> Api:
        """A new user with a token."""
        assert self.admin.post("/v1/users", json={"name": name}).status_code == 201
        return self._with_token(name)

    def node(self, name: str, initiator: str) -> Api:
        """A new node with a token."""
        answer = self.admin.post("/v1/nodes", json={"name": name, "initiator": initiator})
        assert answer.status_code == 201, answer.text
        return self._with_token(name)

    def _with_token(self, name: str) -> Api:
        token = self.admin.post("/v1/tokens", json={"user": name}).json()["token"]
        return Api(self.base, token, self.cacert)

    def command(self, *argv: str, token: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A stratus-… command as a user runs it; stratus-storage gets this home."""
        environment = {**os.environ, **self.environment, "STRATUS_ENDPOINT": self.base, "STRATUS_HOME": str(self.home)}
        environment["STRATUS_TOKEN"] = token or self.admin_token
        done = subprocess.run(
            [str(BIN / argv[0]), *argv[1:]], env=environment, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def storage(self, *argv: str, code: int = 0) -> Result:
        """`stratus-storage` on this home, in the test's own process, which has it loaded; it must end with `code`."""
        umask = os.umask(0o077)
        try:
            done = CliRunner(env={**self.environment, "STRATUS_HOME": str(self.home)}).invoke(stratus_storage, argv)
        finally:
            os.umask(umask)  # the command sets its own
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == code, f"{argv}: {done.exit_code}\n{done.output}"
        return done


def _command_lines() -> Iterator[tuple[int, str]]:
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                yield int(directory.name), line


def _is_ours(pid: int, line: str, home: Path) -> bool:
    """By its command line, its environment or its directory: tgtd's options do not name the home."""
    if str(home) in line:
        return True
    try:
        if os.readlink(f"/proc/{pid}/cwd").startswith(f"{home}/"):
            return True
        return f"STRATUS_EFFECTIVE={home}/".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


@contextmanager
def running(
    home: Path,
    environment: dict[str, str] | None = None,
    arguments: tuple[str, ...] = (),
    cacert: Path | None = None,
) -> Iterator[RunningService]:
    """A started service that leaves nothing behind, whatever the test did to it."""
    service = RunningService(home, environment, arguments, cacert)
    try:
        yield service.start()
    finally:
        if service.process is not None and service.process.poll() is None:
            service.stop()
        service.kill_everything()
