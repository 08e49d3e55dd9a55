"""After a volume's whole cycle the CHAP password and the API token stand nowhere but where they must."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.initiator import Initiator
from tests.support.service import Api, RunningService, initiator_of, running, wait_until

MIB = 1 << 20
HOST = "iqn.2004-10.org.example:host"
PASSWORD = "carol's own password"


class CommandLines(threading.Thread):
    """Every command line on this machine that could be seen while this ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.01):
            self.seen |= {line for line in map(_read, Path("/proc").glob("[0-9]*/cmdline")) if line}

    def end(self) -> bytes:
        self._ended.set()
        self.join()
        return b"\n".join(self.seen)


@contextmanager
def watched() -> Iterator[CommandLines]:
    lines = CommandLines()
    lines.start()
    try:
        yield lines
    finally:
        lines.end()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def forms(secret: str) -> list[bytes]:
    """The secret, and the ways in which it could be written down by accident."""
    raw = secret.encode()
    return [raw, raw.hex().encode(), base64.b64encode(raw), base64.b64encode(b"carol:" + raw)]


def holders(root: Path, secrets: list[str]) -> set[str]:
    """The files below `root`, by their path in it, that hold one of the secrets in any form."""
    needles = [form for secret in secrets for form in forms(secret)]
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)) for path in files if any(needle in _read(path) for needle in needles)}


class Cycle:
    """The life of a volume, by a user with a token and a password; `secrets` are all that were ever told."""

    def __init__(self, service: RunningService, folder: Path) -> None:
        self.service, self.folder = service, folder
        self.chap: list[str] = []
        self.tokens = [service.admin_token]

    def run(self) -> None:
        carol = self.sign_in()
        volume = carol.make_volume(8 * MIB)["id"]
        initiator = self.attach(carol, volume)
        initiator.write(0, 0x71, MIB)
        self.service.restart()
        initiator.read(0, MIB, 0x71)
        self.service.kill(self.service.tgtd_pid())
        wait_until(lambda: initiator.login_error() is None, 60, "the target's return")
        initiator.read(0, MIB, 0x71)
        assert carol.patch(f"/v1/volumes/{volume}", json={"size": 16 * MIB}).status_code == 200
        self.refuse(initiator)
        for attachment in carol.show(f"/v1/volumes/{volume}")["attachments"]:
            carol.detach(attachment["id"])
        assert initiator.login_error() is not None
        self.by_command(volume)

    def sign_in(self) -> Api:
        admin = self.service.admin
        assert admin.post("/v1/users", json={"name": "carol", "password": PASSWORD}).status_code == 201
        key = {"Idempotency-Key": "a-token-for-carol"}
        answers = [admin.post("/v1/tokens", json={"user": "carol"}, headers=key).json() for _ in range(2)]
        assert answers[1]["token"] is None  # told once
        self.tokens.append(answers[0]["token"])
        api = Api(self.service.base, None)
        assert api.get("/v1/whoami", auth=("carol", PASSWORD)).status_code == 200
        assert api.get("/v1/whoami", auth=("carol", PASSWORD + "!")).status_code == 401
        return Api(self.service.base, answers[0]["token"])

    def attach(self, api: Api, volume: str) -> Initiator:
        key = {"Idempotency-Key": "an-attachment"}
        wanted: dict[str, Any] = {"instance_id": "i", "node": "n", "initiator": HOST, "mode": "rw", "mutual_chap": True}
        path = f"/v1/volumes/{volume}/attachments"
        first, second = (api.post(path, json=wanted, headers=key).json() for _ in range(2))
        assert first["connection"] == second["connection"]
        assert api.show(f"/v1/attachments/{first['id']}/connection") == first["connection"]
        auth = first["connection"]["auth"]
        self.chap += [auth["password"], auth["mutual_password"]]
        return initiator_of(first)

    def refuse(self, initiator: Initiator) -> None:
        """Wrong secrets, which the target and the service could be tempted to log."""
        wrong = "deadbeef" * 4
        self.chap.append(wrong)
        liar = Initiator(initiator.portal, initiator.iqn, initiator.initiator, initiator.username, wrong)
        assert liar.login_error() is not None
        self.tokens.append("stratus_" + "x" * 43)
        assert Api(self.service.base, self.tokens[-1]).get("/v1/volumes").status_code == 401

    def by_command(self, volume: str) -> None:
        file = self.folder / "connection.json"
        argv = ("stratus-attach-volume", "--initiator", HOST, "--connection-file", str(file), volume)
        shown = self.service.command(*argv).stdout
        found = file.read_text()
        password = found.split('"password": "')[1].split('"')[0]
        assert password not in shown
        assert file.stat().st_mode & 0o777 == 0o600
        self.chap.append(password)
        self.service.command("stratus-detach-volume", volume)
        self.tokens.append(self.service.command("stratus-storage", "token", "create", "carol").stdout.strip())


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cycle, bytes]]:
    """What was told to whom, and the command lines meanwhile; the service still runs."""
    base = tmp_path_factory.mktemp("secrets")
    with running(base / "home", {"STRATUS_SERVER__PROCESSES": "1"}) as service, watched() as lines:
        done = Cycle(service, base)
        done.run()
        yield done, lines.end()


def test_the_search_finds_what_is_there(cycle: tuple[Cycle, bytes], tmp_path: Path) -> None:
    done, lines = cycle
    assert b"qemu-io" in lines
    assert b"stratus-attach-volume" in lines
    assert len(done.chap) == 4
    assert len(done.tokens) == 4
    (tmp_path / "log").write_text(f"x{done.chap[0]}x")
    assert holders(tmp_path, done.chap) == {"log"}


def test_chap_secrets_are_in_no_file_of_the_service(cycle: tuple[Cycle, bytes]) -> None:
    done, _ = cycle
    assert holders(done.service.home, done.chap) == set()
    assert holders(done.folder, done.chap) == {"connection.json"}


def test_tokens_are_in_no_file_but_the_first_admins(cycle: tuple[Cycle, bytes]) -> None:
    done, _ = cycle
    assert holders(done.folder, done.tokens) == {"home/admin.token"}
    assert (done.service.home / "admin.token").stat().st_mode & 0o777 == 0o600


def test_passwords_are_in_no_file(cycle: tuple[Cycle, bytes]) -> None:
    assert holders(cycle[0].folder, [PASSWORD]) == set()


def test_no_secret_is_in_a_command_line(cycle: tuple[Cycle, bytes]) -> None:
    done, lines = cycle
    assert [form for secret in (*done.chap, *done.tokens, PASSWORD) for form in forms(secret) if form in lines] == []


def test_no_secret_is_in_the_environment_of_the_services_processes(cycle: tuple[Cycle, bytes]) -> None:
    done, _ = cycle
    found = b"".join(_read(Path(f"/proc/{pid}/environ")) for pid in done.service.pids())
    assert b"STRATUS_EFFECTIVE" in found
    assert [form for secret in (*done.chap, *done.tokens, PASSWORD) for form in forms(secret) if form in found] == []


def test_no_secret_is_in_an_answer_but_the_connections(cycle: tuple[Cycle, bytes]) -> None:
    done, _ = cycle
    admin = done.service.admin
    paths = ["volumes", "attachments", "operations", "events", "tokens", "users", "pools", "nodes", "groups"]
    told = "".join(admin.get(f"/v1/{path}", params={} if path == "pools" else {"limit": 1000}).text for path in paths)
    assert "attachment.connection-read" in told
    assert [secret for secret in (*done.chap, *done.tokens, PASSWORD) if secret in told] == []


def test_every_reading_of_a_connection_is_an_event(cycle: tuple[Cycle, bytes]) -> None:
    """The answer told again for an Idempotency-Key counts as one; the first telling is the attachment's own event."""
    read = cycle[0].service.admin.events("attachment.connection-read")
    assert [(event["actor"], event["address"]) for event in read] == [("carol", "127.0.0.1")] * 2
