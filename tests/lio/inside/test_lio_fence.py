"""Detaching: when `drain` says that none is left, none can write any more."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest

from iscsi.target import Export, TargetBusy
from tests.lio.inside.lio_house import MIB, PORTAL, PREFIX, House, Suspendable, connection
from tests.support.initiator import Bare, InitiatorError, Writer, wait_until


def _drained(house: House, export: Export) -> None:
    wait_until(lambda: house.target.drain(export.volume_id) == [])


def test_a_fenced_session_writes_no_more(house: House, iscsid: None) -> None:
    export = house.exported()
    with house.kernel(export) as kernel, kernel.device.open("r+b", buffering=0) as device:
        assert device.write(b"\1" * 4096) == 4096
        os.fsync(device.fileno())
        _drained(house, export)
        assert house.target.sessions() == []
        device.write(b"\2" * 4096)
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(device.fileno())
        house.target.remove(export.volume_id)
        assert kernel.state != "LOGGED_IN"
    with export.path.open("rb") as file:
        assert file.read(4096) == b"\1" * 4096


def test_a_write_in_flight_is_waited_for(house: House, suspendable: Suspendable) -> None:
    rounds = (_held_write_lands(house, suspendable) for _ in range(5))
    assert any(rounds), "what was in flight was never a write"


def _held_write_lands(house: House, suspendable: Suspendable) -> bool:
    """All that must hold of a command in flight; whether it was one that changed a byte, once it was let go."""
    export, other = house.exported(path=suspendable.path), house.exported()
    with Writer(house.initiator(export), depth=1) as writer:
        hold_a_write(suspendable, writer)
        for _ in range(5):
            assert [s.initiator for s in house.target.drain(export.volume_id)] == [export.connections[0].initiator]
            with pytest.raises(TargetBusy) as caught:
                house.target.remove(export.volume_id)
            assert caught.value.volume_id == export.volume_id
        assert house.target.degraded is None
        assert house.initiator(export).login_error() is not None  # it cannot come back meanwhile
        _all_goes_well_elsewhere(house, other)
        before = suspendable.backing.read_bytes()
        suspendable.release()
        _drained(house, export)
        after = suspendable.backing.read_bytes()
        house.target.remove(export.volume_id)
        new = dataclasses.replace(export, connections=(connection("node2"),))
        house.target.ensure_export(new)
        assert house.initiator(export).login_error() is not None
        assert house.initiator(new).login_error() is None
        assert suspendable.backing.read_bytes() == after
        for used in (new, other):
            _drained(house, used)
            house.target.remove(used.volume_id)
    return after != before


def hold_a_write(suspendable: Suspendable, writer: Writer) -> None:
    """Long enough for the next write to be sent and to arrive, in a kernel that has one busy CPU."""
    suspendable.hold()
    rounds = writer.rounds
    with pytest.raises(InitiatorError):
        writer.wait_rounds(3, timeout=2)
    assert writer.rounds <= rounds + 1


def _all_goes_well_elsewhere(house: House, other: Export) -> None:
    third = house.exported()
    for export in (other, third):
        house.initiator(export).write(0, 5, 4096)
    house.target.remove(third.volume_id)
    assert {state.volume_id for state in house.target.inventory()} >= {other.volume_id}


def test_a_successor_sees_the_write_in_flight_too(house: House, suspendable: Suspendable) -> None:
    """It knows nothing of the calls that its predecessor has made; and the session that LIO shows is an idle one."""
    export = house.exported(path=suspendable.path)
    initiator = house.initiator(export)
    with Writer(initiator, depth=1) as writer, initiator.bare():
        house.wait_sessions(2)
        hold_a_write(suspendable, writer)
        assert house.target.drain(export.volume_id)
        successor = house.another()
        for _ in range(3):
            left = successor.drain(export.volume_id)
            assert {session.initiator for session in left} == {initiator.initiator}
            with pytest.raises(TargetBusy):
                successor.remove(export.volume_id)
        suspendable.release()
        wait_until(lambda: successor.drain(export.volume_id) == [])
        successor.remove(export.volume_id)


FENCING = """
import pickle, sys, time
from iscsi.lio import LioTarget
prefix, portals, lock, volume_id = pickle.loads(sys.stdin.buffer.read())
target = LioTarget(prefix, portals, lock)
assert target.drain(volume_id)
print("fencing", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["kill", "terminate"])
def test_a_hand_that_dies_in_a_fence_is_gone_at_once(house: House, suspendable: Suspendable, ending: str) -> None:
    """The kernel waits for the write in flight; the process that waits with it is not ours."""
    export = house.exported(path=suspendable.path)
    errand = pickle.dumps((PREFIX, [PORTAL], house.lock, export.volume_id))
    with Writer(house.initiator(export), depth=1) as writer:
        hold_a_write(suspendable, writer)
        with subprocess.Popen([sys.executable, "-c", FENCING], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hand:
            assert hand.stdin
            assert hand.stdout
            hand.stdin.write(errand)
            hand.stdin.close()
            assert hand.stdout.readline() == b"fencing\n"
            getattr(hand, ending)()
            assert hand.wait(10) < 0
        successor = house.another()
        assert {s.initiator for s in successor.drain(export.volume_id)} == {export.connections[0].initiator}
        with pytest.raises(TargetBusy):
            successor.remove(export.volume_id)
        suspendable.release()
        wait_until(lambda: successor.drain(export.volume_id) == [])
        successor.remove(export.volume_id)
    assert successor.inventory() == []


def test_those_that_are_kept_notice_nothing(house: House) -> None:
    """The kept one has two sessions, as over two paths: the one that LIO does not show is not taken for the other's."""
    kept, gone = connection("kept"), connection("gone")
    export = house.exported(kept, gone)
    with (
        Writer(house.initiator(export, kept)) as writer,
        house.initiator(export, kept).bare() as second,
        Writer(house.initiator(export, gone), offset=8 * MIB),
    ):
        house.wait_sessions(3)
        wait_until(lambda: house.target.drain(export.volume_id, keep=[kept.login]) == [])
        assert len(house.target.sessions()) == 2
        assert second.command(b"\x28\0\0\x00\x70\0\0\0\x08\0", 4096) == bytes(4096)
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert house.initiator(export, gone).login_error() is not None
    assert house.initiator(export, kept).login_error() is None
    assert house.target.inventory()[0].initiators == {kept.initiator}


def test_a_write_in_flight_beside_one_that_is_kept(house: House, suspendable: Suspendable) -> None:
    kept, gone = connection("kept"), connection("gone")
    export = house.exported(kept, gone, path=suspendable.path)
    with house.initiator(export, kept).bare(), Writer(house.initiator(export, gone), depth=1) as writer:
        hold_a_write(suspendable, writer)
        for target in (house.target, house.another()):
            assert {s.initiator for s in target.drain(export.volume_id, keep=[kept.login])} == {gone.initiator}
        suspendable.release()
        wait_until(lambda: house.target.drain(export.volume_id, keep=[kept.login]) == [])
        house.wait_sessions(1)
    assert house.target.degraded is None


def test_who_is_kept_with_another_account_cannot_log_in_again(house: House) -> None:
    old = connection("node1")
    export = house.exported(old)
    new = dataclasses.replace(old, credentials=connection("node1").credentials)
    with house.initiator(export).bare() as session:
        house.wait_sessions(1)
        assert house.target.drain(export.volume_id, keep=[new.login]) == []
        assert session.command(b"\x28\0\0\0\0\0\0\0\x08\0", 4096) == bytes(4096)
    assert house.initiator(export).login_error() is not None
    house.target.ensure_export(dataclasses.replace(export, connections=(new,)))
    assert house.initiator(export, new).login_error() is None


@pytest.mark.parametrize("stage", ["connected", "authenticated"])
def test_a_login_that_stopped_half_way_does_not_pass_the_fence(house: House, stage: str) -> None:
    export = house.exported()
    with Bare(house.initiator(export)) as sleeper:
        if stage == "authenticated":
            sleeper.authenticate()
        assert house.target.drain(export.volume_id) == []
        with pytest.raises((InitiatorError, OSError)):  # noqa: PT012
            if stage == "connected":
                sleeper.authenticate()
            sleeper.enter_full_feature()
            sleeper.command(b"\x28\0\0\0\0\0\0\0\x08\0", 4096)
    wait_until(lambda: house.target.drain(export.volume_id) == [])
    house.target.remove(export.volume_id)
