"""Peers that say nothing: logins that stop half-way, with or without a secret, keep nobody waiting but themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from iscsi import names
from iscsi.lio_configfs import CORE
from iscsi.target import Connection, Export, TargetBusy
from tests.lio.inside.lio_house import PORTAL, PREFIX, House, connection
from tests.support.initiator import Bare, Initiator, InitiatorError, Writer, wait_until

STAGES = pytest.mark.parametrize("stage", ["nameless", "named", "challenged", "authenticated"])


@contextlib.contextmanager
def _silent(who: Initiator, stage: str) -> Iterator[Bare]:
    """It connects, goes so far, and then says nothing."""
    with Bare(who) as sleeper:
        if stage in ("named", "challenged"):
            keys = {"InitiatorName": who.initiator, "TargetName": who.iqn, "SessionType": "Normal"}
            sleeper._login(0x00, keys | {"AuthMethod": "CHAP"})
        if stage == "challenged":
            sleeper._login(0x00, {"CHAP_A": "5"})
        if stage == "authenticated":
            sleeper.authenticate()
        yield sleeper


def _is_gone(house: House, export: Export) -> None:
    """No byte of it can be reached."""
    name = names.target_name(PREFIX, export.volume_id)
    assert not list(Path(CORE).glob(f"*/{name}"))
    assert house.initiator(export).login_error() is not None
    assert not any(s.online or s.initiators for s in house.target.inventory() if s.volume_id == export.volume_id)


@STAGES
def test_the_volume_is_removed_and_can_be_attached_when_the_peer_has_gone(house: House, stage: str) -> None:
    """LIO has its portals for no other group of the target, and takes no other login there, before that."""
    export = house.exported()
    again = dataclasses.replace(export, connections=(connection("node2"),))
    with _silent(house.initiator(export), stage) as sleeper:
        assert house.target.drain(export.volume_id) == []
        for target in (house.target, house.another()):
            target.remove(export.volume_id)
            _is_gone(house, export)
            assert target.sessions() == target.drain(export.volume_id) == []
            if stage != "nameless":
                with pytest.raises(TargetBusy, match="not finished"):
                    target.ensure_export(again)
            target.open_portals()
            assert target.degraded is None
        with pytest.raises((InitiatorError, OSError)):
            sleeper.enter_full_feature()
    wait_until(lambda: _exported(house, again))
    house.initiator(again).write(0, 7, 4096)
    assert house.initiator(export).login_error() is not None


def _exported(house: House, export: Export) -> bool:
    with contextlib.suppress(TargetBusy):
        house.target.ensure_export(export)
        return True
    return False


@STAGES
def test_the_other_volumes_notice_nothing(house: House, stage: str) -> None:
    export, other = house.exported(), house.exported()
    with Writer(house.initiator(other)) as writer, _silent(house.initiator(export), stage):
        house.target.remove(export.volume_id)
        writer.wait_rounds(2)
        assert writer.stop() == []
        wait_until(lambda: house.target.drain(other.volume_id) == [])
        house.target.remove(other.volume_id)
        third = house.exported()
        assert house.initiator(third).login_error() is None
        assert house.target.degraded is None
    _all_goes(house, export)


@STAGES
def test_a_drain_that_keeps_others(house: House, stage: str) -> None:
    kept, gone = connection("kept"), connection("gone")
    export = house.exported(kept, gone)
    with Writer(house.initiator(export, kept)) as writer, _silent(house.initiator(export, gone), stage):
        house.wait_sessions(1)
        assert house.target.drain(export.volume_id, keep=[kept.login]) == []
        house.target.ensure_export(dataclasses.replace(export, connections=(kept, connection("comer"))))
        (state,) = house.target.inventory()
        assert state.complete
        assert gone.initiator not in state.initiators
        writer.wait_rounds(2)
        assert writer.stop() == []
        wait_until(lambda: house.target.drain(export.volume_id) == [])
        house.target.remove(export.volume_id)
        _is_gone(house, export)
    _all_goes(house, export)


def _ambiguous(house: House) -> tuple[Connection, Connection, Export]:
    kept, gone = connection("kept"), connection("gone")
    return kept, gone, house.exported(kept, gone)


@pytest.mark.parametrize("successor", [False, True])
def test_a_kept_one_with_two_sessions(house: House, successor: bool) -> None:
    """LIO shows one of them, so whose the other is cannot be told before the silent peer has gone. Nobody hangs."""
    kept, gone, export = _ambiguous(house)
    target, other = house.target, house.exported()
    with Writer(house.initiator(export, kept)) as writer, house.initiator(export, kept).bare():
        house.wait_sessions(2)
        with _silent(house.initiator(export, gone), "named"):
            assert target.drain(export.volume_id, keep=[kept.login])
            target = house.another() if successor else target
            assert target.drain(export.volume_id, keep=[kept.login])
            with pytest.raises(TargetBusy):
                target.ensure_export(dataclasses.replace(export, connections=(kept,)))
            assert len(target.sessions()) == 2
            assert not any(state.complete for state in target.inventory() if state.volume_id == export.volume_id)
            target.open_portals()
            target.ensure_export(other)
            assert target.degraded is None
        wait_until(lambda: target.drain(export.volume_id, keep=[kept.login]) == [])
        assert len(target.sessions()) == 2
        target.ensure_export(dataclasses.replace(export, connections=(kept,)))
        writer.wait_rounds(2)
        assert writer.stop() == []


def test_a_kept_one_with_two_sessions_can_be_fenced_too(house: House) -> None:
    kept, gone, export = _ambiguous(house)
    with (
        Writer(house.initiator(export, kept)),
        house.initiator(export, kept).bare(),
        _silent(house.initiator(export, gone), "named"),
    ):
        house.wait_sessions(2)
        assert house.target.drain(export.volume_id, keep=[kept.login])
        wait_until(lambda: house.target.drain(export.volume_id) == [])
        house.target.remove(export.volume_id)
        _is_gone(house, export)
        assert house.target.degraded is None
    _all_goes(house, export)


def test_portals_change_meanwhile(house: House) -> None:
    """LIO lets nobody into the volume before the old one has gone."""
    export, other = house.exported(), house.exported()
    moved = house.another(portals=[PORTAL, ("127.0.0.1", 3261)])
    moved.open_portals()
    right = house.initiator(export)
    with _silent(Initiator("127.0.0.1:3261", right.iqn, right.initiator), "named"):
        house.target.open_portals()
        assert house.target.degraded is None
        assert house.initiator(other).login_error() is None
        house.target.remove(other.volume_id)
        assert not any(state.complete for state in house.target.inventory())
    wait_until(lambda: _exported(house, export))
    assert house.target.inventory()[0].complete
    _all_goes(house, export)


def _all_goes(house: House, export: Export) -> None:
    """When the peer has closed its connection nothing is left of it."""

    def gone() -> bool:
        house.clear()
        return house.target.inventory() == []

    wait_until(gone)
    house.target.ensure_export(export)
    assert house.target.inventory()[0].complete
    assert house.initiator(export).login_error() is None
