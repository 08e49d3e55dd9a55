"""A kernel that does not answer: callers go on, everybody is told, and nothing happens late."""

from __future__ import annotations

import dataclasses
import datetime as dt
import threading
from collections.abc import Iterator

import pytest
import rtslib_fb as rtslib

from blockdev.locks import FileLock
from iscsi import names
from iscsi.target import Export, TargetUnavailable
from tests.lio.inside.lio_house import PREFIX, House, Suspendable, connection
from tests.lio.inside.test_lio_fence import hold_a_write
from tests.support.initiator import Writer, wait_until


@pytest.fixture
def hung(house: House, suspendable: Suspendable) -> Iterator[Export]:
    """Somebody deletes an ACL whose session has a write in flight, as targetcli does: to list the ACLs is to wait."""
    export = house.exported(path=suspendable.path)
    target = rtslib.Target(rtslib.FabricModule("iscsi"), names.target_name(PREFIX, export.volume_id), mode="lookup")
    acl = rtslib.NodeACL(rtslib.TPG(target, 1, mode="lookup"), export.connections[0].initiator, mode="lookup")
    stuck = threading.Thread(target=acl.delete, daemon=True)
    with Writer(house.initiator(export), depth=1) as writer:
        hold_a_write(suspendable, writer)
        stuck.start()
        stuck.join(0.5)
        assert stuck.is_alive(), "the kernel is not stuck"
        yield export
        suspendable.release()
        stuck.join(20)


def test_callers_are_not_frozen_and_nothing_happens_late(house: House, hung: Export, suspendable: Suspendable) -> None:
    steps: list[str] = []
    target, other = house.another(deadline=0.5, trace=steps.append), house.export()
    wanted = dataclasses.replace(hung, connections=(connection("node2"),))
    assert target.degraded is None
    with pytest.raises(TargetUnavailable, match="has not answered"):
        target.ensure_export(wanted)
    assert target.degraded
    assert str(hung.volume_id) in target.degraded.call
    assert dt.datetime.now(dt.UTC) - target.degraded.since < dt.timedelta(minutes=1)
    for call in (target.sessions, target.inventory, lambda: target.remove(other.volume_id)):
        with pytest.raises(TargetUnavailable, match=str(hung.volume_id)):
            call()
    with pytest.raises(TargetUnavailable, match="another hand"):
        house.another(deadline=0.2).ensure_export(other)
    suspendable.release()
    wait_until(lambda: target.degraded is None)
    assert steps == ["acl"]
    assert not target.inventory()[0].initiators
    house.target.ensure_export(wanted)
    assert house.initiator(wanted).login_error() is None


def test_another_hand_at_work_is_waited_for_and_no_longer_than_the_deadline(house: House) -> None:
    export, target = house.export(), house.another(deadline=5)
    with FileLock(house.lock):
        with pytest.raises(TargetUnavailable, match="another hand"):
            target.ensure_export(export)
        assert target.inventory() == []
    assert target.degraded is None
    target.ensure_export(export)
