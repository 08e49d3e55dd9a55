"""The process that keeps the others: started again, killed when silent, given up when hopeless, ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.config import ConfigError, Settings, load
from app.supervisor import Child, Supervisor, check_listen, prepare
from tests.support.service import BIN, Api, RunningService, free_port, running, wait_until


def settings(tmp_path: Path, **flags: Any) -> Settings:
    return load(tmp_path / "home", environ={}, flags=flags)


# ---------------------------------------------------------------- where it may listen


@pytest.mark.parametrize(
    "server",
    [
        {"listen": "127.0.0.1:8080"},
        {"listen": "[::1]:8080"},
        {"listen": "localhost:8080"},
        {"listen": "0.0.0.0:8080", "behind_proxy": True},
        {"listen": "0.0.0.0:8443", "tls_cert": "/c", "tls_key": "/k"},
    ],
)
def test_loopback_tls_and_a_proxy_are_fine(tmp_path: Path, server: dict[str, object]) -> None:
    check_listen(settings(tmp_path, server=server))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"server": {"listen": "0.0.0.0:8080"}}, "without TLS"),
        ({"server": {"listen": "192.0.2.1:8080"}}, "without TLS"),
        ({"server": {"listen": "storage.example:8080"}}, "without TLS"),
        ({"server": {"listen": "[::]:8080"}}, "without TLS"),
        ({"server": {"tls_cert": "/c"}}, "go together"),
        ({"server": {"tls_key": "/k"}}, "go together"),
    ],
)
def test_secrets_do_not_cross_a_network_in_the_clear(tmp_path: Path, flags: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_listen(settings(tmp_path, **flags))


# ---------------------------------------------------------------- children


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child("sleeper", ["sleep", "600"], dict(os.environ), "KILL")
    yield made
    made.end(signal.SIGKILL)
    made.wait(time.monotonic() + 10)


def test_a_child_that_ends_is_started_again_ever_more_slowly(child: Child) -> None:
    child.argv = ["true"]
    pauses = []
    for _ in range(7):
        child.keep()
        if child.process is None:  # its end was noticed: it waits for its pause
            child.not_before = 0.0
            child.keep()
        assert child.process is not None
        child.process.wait(10)
        pauses.append(child.pause)
    assert pauses[0] == 0.0
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 1.0
    child.keep()
    assert child.process is None  # not before its pause is over


def test_a_child_that_stays_up_is_forgiven(child: Child) -> None:
    child.pause = 5.0
    child.keep()
    child.keep()
    assert child.pause == 5.0
    child.started -= 11
    child.keep()
    assert child.pause == 0.0


def test_a_child_that_does_not_end_is_killed(child: Child) -> None:
    child.argv = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]
    child.start()
    assert child.process is not None
    wait_until(lambda: b"sleep" in _children(child.process.pid) if child.process else False)
    child.end()
    child.wait(time.monotonic() + 0.2)
    assert child.process.returncode == -signal.SIGKILL


def _children(pid: int) -> bytes:
    return subprocess.run(["ps", "--ppid", str(pid), "-o", "args="], capture_output=True).stdout


def test_a_child_that_never_was_is_waited_for_without_harm() -> None:
    child = Child("none", ["true"], {}, "TERM")
    child.end()
    child.wait(0)


def test_a_child_dies_with_its_supervisor(tmp_path: Path) -> None:
    program = (
        "import os, time; from app.supervisor import Child;"
        "c = Child('c', ['sleep', '600'], dict(os.environ), 'TERM'); c.start(); time.sleep(0.5);"
        "print(c.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    wait_until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------- the home


def test_a_home_is_prepared_once_and_its_secrets_are_private(tmp_path: Path) -> None:
    made = settings(tmp_path)
    prepare(made)
    token, keys = made.home / "admin.token", made.key_dir / "secrets.json"
    assert token.stat().st_mode & 0o777 == keys.stat().st_mode & 0o777 == 0o600
    before = (token.read_text(), keys.read_text())
    prepare(made)
    assert (token.read_text(), keys.read_text()) == before


def serve(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [str(BIN / "stratus-storage"), "serve", "--home", str(home), *arguments]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_a_home_that_is_served_is_not_served_twice(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running(home) as service:
        second = serve(home, "--listen", f"127.0.0.1:{free_port()}", "--portal", f"127.0.0.1:{free_port()}")
        assert second.returncode == 2
        assert "is being served already" in second.stderr
        assert service.is_ready()


def test_what_cannot_start_ends_with_1_and_says_where_to_look(tmp_path: Path) -> None:
    done = serve(tmp_path / "home", "--portal", f"127.0.0.1:{free_port()}", "--listen", "127.0.0.1:1",
                 STRATUS_SERVER__TLS_CERT="/nowhere/cert", STRATUS_SERVER__TLS_KEY="/nowhere/key")  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "the api does not stay up" in done.stderr
    assert str(tmp_path / "home" / "log") in done.stderr


# ---------------------------------------------------------------- silence


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("supervised") / "home") as started:
        yield started


def test_a_worker_that_hangs_is_killed_and_replaced(service: RunningService) -> None:
    first = service.worker_pid()
    service.kill(first, signal.SIGSTOP)
    wait_until(lambda: not _alive(first), 60)
    assert wait_until(lambda: service.worker_pid() != first and service.is_ready(), 60)
    assert "the worker has been silent" in service.output()
    _make_a_volume(service)


def _parent(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def _make_a_volume(service: RunningService) -> None:
    api = service.admin
    asked = api.post("/v1/volumes", json={"size": 1 << 20, "name": "after"})
    assert asked.status_code in (201, 202), asked.text
    wait_until(lambda: _state(api) == "available", 60, "the volume")


def _state(api: Api) -> str:
    return str(api.get("/v1/volumes", params={"name": "after"}).json()["items"][0]["state"])


def test_an_api_that_dies_is_started_again(service: RunningService) -> None:
    def master() -> int:
        found = [pid for pid in service.pids("gunicorn") if _parent(pid) == service.process.pid]  # type: ignore[union-attr]
        return found[0] if found else 0

    first = wait_until(master)
    service.kill(first)
    wait_until(lambda: "api ended with -9" in service.output(), 60)
    wait_until(lambda: master() not in (0, first) and service.is_ready(), 60)


def test_a_supervisor_is_idle_until_it_runs(tmp_path: Path) -> None:
    made = settings(tmp_path)
    made.make_directories()
    supervisor = Supervisor(made, keep_target=False)
    assert (supervisor.worker.process, supervisor.api.process) == (None, None)
    supervisor._kill_if_silent()
    assert not supervisor._hopeless()
