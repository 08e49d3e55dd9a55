"""The tgtd process: alone in its directory, outliving its parent, gone when it is told to go."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from iscsi.target import TargetError, TargetRefused, TargetUnavailable
from iscsi.tgt_daemon import TgtDaemon
from tests.iscsi.conftest import Brake, House
from tests.support.initiator import Writer, lost, wait_until

Daemons = Callable[..., TgtDaemon]


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_life(daemons: Daemons) -> None:
    daemon = daemons()
    assert not daemon.alive()
    assert not daemon.adopt()
    assert daemon.pid is None
    daemon.stop()
    daemon.kill()
    daemon.start()
    pid = daemon.pid
    assert pid
    assert daemon.alive()
    assert daemon.portals() == []
    with pytest.raises(TargetError, match="already"):
        daemon.start()
    daemon.stop()
    assert not daemon.alive()
    assert not Path(f"/proc/{pid}").exists()


def test_portals(daemons: Daemons) -> None:
    daemon = daemons()
    daemon.start()
    first = daemon.open_portal("127.0.0.1:0")
    assert daemon.open_portal(first) == first
    sixth = daemon.open_portal("[0:0:0:0:0:0:0:1]:0")
    assert re.fullmatch(r"\[::1\]:\d+", sixth)
    assert daemon.open_portal(sixth) == sixth
    assert sorted(daemon.portals()) == sorted([first, sixth])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TargetRefused):
        daemon.open_portal(f"127.0.0.1:{taken.getsockname()[1]}")
    for bad in ("localhost:3260", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "::1:3260"):
        with pytest.raises(ValueError, match=r"portal|address|Expected|Octet|octets"):
            daemon.open_portal(bad)


def test_ipv6(house: House) -> None:
    export = house.exported()
    house.portal = house.daemon.open_portal("[::1]:0")
    with Writer(house.initiator(export)) as writer:
        assert {session.address for session in house.target.sessions()} == {"::1"}
        house.target.grow(export)
        writer.wait_rounds(1)
        assert writer.stop() == []
    assert house.target.drain(export.volume_id) == []


def test_it_outlives_its_parent_and_is_adopted(daemons: Daemons) -> None:
    daemon = daemons()
    script = (
        "import os, signal, sys; from pathlib import Path; from iscsi.tgt_daemon import TgtDaemon; "
        "d = TgtDaemon(Path(sys.argv[1]), Path(sys.argv[1]) / 'log', 7); d.start(); d.open_portal('127.0.0.1:0'); "
        "os.killpg(0, signal.SIGKILL)"
    )
    parent = subprocess.run([sys.executable, "-c", script, daemon.ipc.directory], start_new_session=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert daemon.adopt()
    pid = daemon.pid
    assert pid
    assert len(daemon.portals()) == 1
    daemon.stop()
    assert not _runs(pid)
    assert not daemon.adopt()


def test_its_death_is_noticed(daemons: Daemons) -> None:
    daemon = daemons()
    with pytest.raises(TargetUnavailable):
        daemon.pidfd()
    daemon.start()
    pidfd = daemon.pidfd()
    try:
        assert select.select([pidfd], [], [], 0)[0] == []
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0] == [pidfd]
    finally:
        os.close(pidfd)
    wait_until(lambda: not daemon.alive())
    daemon.start()  # over the socket and the lock file that were left behind
    assert daemon.alive()


def test_a_tgtd_that_hangs_is_not_adopted_but_replaced(daemons: Daemons) -> None:
    daemon = daemons()
    daemon.start()
    first = daemon.pid
    assert first
    os.kill(first, signal.SIGSTOP)
    daemon.ipc.timeout = 0.2
    assert daemon.alive()
    assert not daemon.adopt()
    with pytest.raises(TargetUnavailable):
        daemon.portals()
    daemon.ipc.timeout = 10
    daemon.ipc.timeout = 0.5
    daemon.start()
    assert daemon.pid != first
    assert not _runs(first)


def test_stop_kills_what_hangs(daemons: Daemons) -> None:
    daemon = daemons()
    daemon.start()
    pid = daemon.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    daemon.ipc.timeout = 0.2
    daemon.stop(timeout=0.2)
    assert not _runs(pid)


def test_stop_ends_sessions_and_loses_nothing(house: House) -> None:
    export = house.exported()
    pid = house.daemon.pid
    assert pid
    with Writer(house.initiator(export)) as writer:
        house.daemon.stop()
        assert not _runs(pid)
        expected = dict(writer.expected)
        house.start()
        house.target.ensure_export(export)
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert expected.keys() <= writer.expected.keys()
    assert lost(export.path, writer.expected) == []


def test_stop_does_not_wait_for_ever_for_a_write(slow_house: House, brake: Brake) -> None:
    export = slow_house.exported()
    pid = slow_house.daemon.pid
    assert pid
    with Writer(slow_house.initiator(export), depth=1):
        brake.on()
        wait_until(brake.holds)
        slow_house.daemon.stop(timeout=0.3)
        assert not _runs(pid)


def test_two_live_side_by_side(daemons: Daemons, tmp_path: Path) -> None:
    one, two = House(tmp_path, daemons("one")), House(tmp_path, daemons("two"))
    one.start()
    two.start()
    export = one.exported()
    other = two.exported()
    assert export.tid == other.tid
    assert [state.volume_id for state in one.target.inventory()] == [export.volume_id]
    two.daemon.kill()
    assert one.initiator(export).login_error() is None
    assert not two.daemon.alive()


def test_a_path_longer_than_a_socket_address(daemons: Daemons, tmp_path: Path) -> None:
    house = House(tmp_path, daemons("/".join(["a-rather-long-directory-name"] * 8)))
    house.start()
    export = house.exported()
    assert house.initiator(export).login_error() is None
    house.daemon.stop()


def test_a_failed_start_says_why(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons(LD_PRELOAD=str(tmp_path / "absent.so"), PATH="/nonexistent")
    with pytest.raises((TargetUnavailable, OSError)):
        daemon.start()
    taken = daemons("taken")
    (taken.ipc.directory / taken.ipc.name).mkdir()  # tgtd cannot bind there
    with pytest.raises(TargetUnavailable, match="did not start"):
        taken.start()
