"""Detaching: when `drain` says that none is left, none can write any more."""

from __future__ import annotations

import dataclasses
import os

import pytest

from iscsi.target import TargetBusy, TargetUnavailable
from iscsi.tgt_logins import close_unfinished
from tests.iscsi.conftest import MIB, Brake, House, connection
from tests.support.initiator import Bare, InitiatorError, Writer, wait_until


def test_a_write_in_flight_is_waited_for(slow_house: House, brake: Brake) -> None:
    house, export = slow_house, slow_house.exported()
    old = house.initiator(export)
    with Writer(old, depth=1) as writer:
        brake.on()
        wait_until(brake.holds)
        for _ in range(20):
            sessions = house.target.drain(export.volume_id)
            assert [s.initiator for s in sessions] == [old.initiator]
            with pytest.raises(TargetBusy) as caught:
                house.target.remove(export.volume_id)
            assert caught.value.volume_id == export.volume_id
        assert house.target.inventory()[0].path == export.path
        assert old.login_error() is not None  # it cannot come back while its write is in flight
        brake.off()
        wait_until(lambda: house.target.drain(export.volume_id) == [])
        after = export.path.read_bytes()
        house.target.remove(export.volume_id)
        assert writer.process.poll() is None  # still trying to come back
        new = connection("node2")
        house.target.ensure_export(dataclasses.replace(export, connections=(new,)))
        assert "(515)" in (old.login_error() or "")
        assert house.initiator_of(export.volume_id, new).login_error() is None
        assert export.path.read_bytes() == after


def test_those_that_are_kept_notice_nothing(house: House) -> None:
    kept, gone = connection("kept"), connection("gone")
    export = house.exported(kept, gone)
    with (
        Writer(house.initiator_of(export.volume_id, kept)) as writer,
        Writer(house.initiator_of(export.volume_id, gone), offset=8 * MIB),
    ):
        before = [s for s in house.target.sessions() if s.initiator == kept.initiator]
        wait_until(lambda: house.target.drain(export.volume_id, keep=[kept.login]) == [])
        assert house.target.sessions() == before
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert house.initiator_of(export.volume_id, gone).login_error() is not None
    assert house.initiator_of(export.volume_id, kept).login_error() is None


@pytest.mark.parametrize("stage", ["connected", "authenticated"])
def test_a_login_that_stopped_half_way_does_not_pass_the_fence(house: House, stage: str) -> None:
    """tgtd would let it in even later: into a new export of the volume that it has no right to."""
    export = house.exported()
    with Bare(house.initiator(export)) as sleeper:
        if stage == "authenticated":
            sleeper.authenticate()
        assert house.target.sessions() == []
        assert house.target.drain(export.volume_id) == []
        house.target.remove(export.volume_id)
        house.target.ensure_export(dataclasses.replace(export, connections=(connection("node2"),)))
        with pytest.raises((InitiatorError, OSError)):  # noqa: PT012
            if stage == "connected":
                sleeper.authenticate()
            sleeper.enter_full_feature()
        assert house.target.sessions() == []


def test_a_tgtd_that_is_gone_is_never_called_drained(house: House) -> None:
    export = house.exported()
    house.daemon.kill()
    with pytest.raises(TargetUnavailable):
        house.target.drain(export.volume_id)


def test_half_logins_of_a_process_that_is_gone_are_not_counted_as_none(house: House) -> None:
    pid = house.daemon.pid
    assert pid
    house.daemon.kill()
    with pytest.raises(OSError, match=str(pid)):
        close_unfinished(pid, set)


def test_a_fence_leaves_no_connection_to_tgtd_open(house: House) -> None:
    """One that ends before its request came makes tgtd read its end for ever, if the last error was an EAGAIN."""
    kept = connection("kept")
    export = house.exported(kept)
    with Writer(house.initiator_of(export.volume_id, kept)) as writer:
        before = len(os.listdir(f"/proc/{house.daemon.pid}/fd"))
        for _ in range(50):
            house.target.drain(export.volume_id, keep=[kept.login])
        wait_until(lambda: len(os.listdir(f"/proc/{house.daemon.pid}/fd")) <= before)
        assert writer.stop() == []
