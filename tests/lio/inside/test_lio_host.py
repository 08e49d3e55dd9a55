"""LIO as a service's target: one owner, portals last, an orderly end."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from iscsi.lio_host import LioHost
from iscsi.target import TargetBusy, TargetError
from tests.lio.inside.lio_house import PORTAL, PREFIX, House, Suspendable
from tests.lio.inside.test_lio_fence import hold_a_write
from tests.support.initiator import Writer

WHERE = f"{PORTAL[0]}:{PORTAL[1]}"


@pytest.fixture
def host(tmp_path: Path) -> LioHost:
    return LioHost(PREFIX, [WHERE], "one", locks=tmp_path)


def test_the_portals_open_when_everything_is_there(house: House, host: LioHost) -> None:
    exports = [house.export(), house.export()]

    def rebuild() -> None:
        for export in exports:
            host.target.ensure_export(export)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(PORTAL)

    host.bring_up(rebuild)
    assert [house.initiator(export).login_error() for export in exports] == [None, None]


def test_a_prefix_has_one_owner(house: House, host: LioHost, tmp_path: Path) -> None:
    export, other = house.export(), LioHost(PREFIX, [WHERE], "two", locks=tmp_path)
    host.bring_up(lambda: host.target.ensure_export(export))
    with pytest.raises(TargetError, match="another service"):
        other.bring_up(lambda: pytest.fail("it rebuilds what is another's"))
    other.stop()
    assert house.initiator(export).login_error() is None
    host.stop()
    assert host.target.inventory() == []


def test_a_prefix_stays_its_owners_while_there_are_exports(house: House, host: LioHost, tmp_path: Path) -> None:
    export = house.export()
    host.bring_up(lambda: host.target.ensure_export(export))
    host._lock.release()  # it died, or was told to keep its target
    other = LioHost(PREFIX, [WHERE], "two", locks=tmp_path)
    with pytest.raises(TargetError, match=r"\(one\)"):
        other.bring_up(lambda: pytest.fail("it rebuilds what is another's"))
    other.stop()
    assert house.initiator(export).login_error() is None
    again = LioHost(PREFIX, [WHERE], "one", locks=tmp_path)
    again.bring_up(lambda: None)
    again.stop()
    assert house.target.inventory() == []
    again._lock.release()
    other.bring_up(lambda: None)


def test_an_end_says_what_it_waits_for_and_ends_the_rest(house: House, host: LioHost, suspendable: Suspendable) -> None:
    export, other = house.export(path=suspendable.path), house.export()
    host.bring_up(lambda: host.target.ensure_export(export))
    host.target.ensure_export(other)
    with Writer(house.initiator(export), depth=1) as writer:
        hold_a_write(suspendable, writer)
        with pytest.raises(TargetBusy) as busy:
            host.stop(timeout=0.5)
        assert busy.value.volume_id == export.volume_id
        assert [state.volume_id for state in host.target.inventory()] == [export.volume_id]
        suspendable.release()
    host.stop()
    assert host.target.inventory() == []


def test_its_watch_ends_with_the_service(host: LioHost) -> None:
    stopping = threading.Event()
    stopping.set()
    host.watch(stopping)
