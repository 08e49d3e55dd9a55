"""Hands that die between two layers, and what is not ours."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import rtslib_fb as rtslib

from blockdev import loop
from iscsi import lio_configfs, lio_errand_runner, names
from iscsi.lio_errands import Errands
from iscsi.target import Credentials, Export
from tests.lio.inside.lio_house import MIB, PORTAL, PREFIX, House, Interrupted, connection, interrupt_at
from tests.support.initiator import Initiator, InitiatorError, wait_until


def _export(house: House) -> Export:
    mutual = Credentials("proof1", "proof-of-target1")
    return house.export(connection("node1", mutual=mutual), connection("node2"), read_only=True)


def _is_closed(house: House, export: Export) -> None:
    """Nobody gets in without CHAP, nobody without a LUN."""
    right = house.initiator(export)
    assert Initiator(right.portal, right.iqn, right.initiator).login_error() is not None
    try:
        right.bare().close()
    except (InitiatorError, OSError):
        return
    assert right.size() == export.size


def _is_right(house: House, export: Export) -> None:
    (state,) = [state for state in house.target.inventory() if state.volume_id == export.volume_id]
    assert state.complete
    assert state.initiators == {who.initiator for who in export.connections}
    for who in export.connections:
        assert names.serial(export.volume_id).encode() in house.initiator(export, who).vpd(0x80)


def test_a_half_made_export_is_closed_and_can_be_completed_or_removed(house: House, lio: Path) -> None:
    """Stop after each step."""
    for number in range(1, 100):
        export, seen = _export(house), list[str]()
        target = house.another(trace=interrupt_at(number, seen))
        try:
            target.open_portals()
            target.ensure_export(export)
        except Interrupted:
            (state,) = house.target.inventory()
            assert not state.complete or seen[-1] == "enabled"
        else:
            break
        _is_closed(house, export)
        if number % 2:
            house.target.ensure_export(export)
            _is_right(house, export)
        house.clear()
        assert os.listdir(lio / "core") == ["alua"]
    assert seen[:4] == ["backstore", "identity", "target", "group"]
    assert seen.index("lun") < seen.index("acl") < seen.index("mapped lun") < seen.index("admitted")
    assert seen[-2:] == ["portal", "enabled"]


def test_an_interrupted_change_or_removal_is_finished(house: House) -> None:
    for number in range(1, 100):
        export, seen = _export(house), list[str]()
        house.target.ensure_export(export)
        first, _ = export.connections
        wanted = dataclasses.replace(export, connections=(_renewed(first), connection("node3")))
        target = house.another(trace=interrupt_at(number, seen))
        try:
            target.ensure_export(wanted)
            target.remove(wanted.volume_id)
        except Interrupted:
            _is_closed(house, export)
            house.target.ensure_export(wanted)
            _is_right(house, wanted)
            house.clear()
        else:
            break
    assert {"revoked", "secrets forgotten", "closed", "lun deleted", "backstore deleted", "target deleted"} <= set(seen)


def _renewed(who: object) -> object:
    return dataclasses.replace(who, credentials=connection("any").credentials)  # type: ignore[type-var]


KILLED = """
import os, pickle, signal, sys
from iscsi.lio import LioTarget
prefix, portals, lock, step, export = pickle.loads(sys.stdin.buffer.read())
def trace(done):
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)
target = LioTarget(prefix, portals, lock, trace=trace)
target.open_portals()
target.ensure_export(export)
"""


@pytest.mark.parametrize("step", ["backstore", "lun", "admitted"])
def test_a_killed_hand_leaves_what_the_next_one_finishes(house: House, step: str) -> None:
    export = house.export()
    errand = (PREFIX, [PORTAL], house.lock, step, export)
    killed = subprocess.run([sys.executable, "-c", KILLED], input=pickle.dumps(errand), check=False, timeout=60)
    assert killed.returncode == -9
    assert not house.target.inventory()[0].complete
    house.target.ensure_export(export)
    _is_right(house, export)


@pytest.mark.parametrize("stage", ["slot", "empty", "configured", "enabled"])
def test_a_hand_that_died_inside_rtslib(house: House, lio: Path, stage: str) -> None:
    """Between the steps that rtslib takes to make a backstore."""
    export = house.export()
    iqn = names.target_name(PREFIX, export.volume_id)
    slot = lio / "core" / f"iblock_{lio_configfs.slots(export.volume_id)[0]}"
    slot.mkdir()
    if stage != "slot":
        (slot / iqn).mkdir()
        assert [(state.volume_id, state.complete) for state in house.target.inventory()] == [(export.volume_id, False)]
    if stage in ("configured", "enabled"):
        with loop.attached(export.path) as device:
            (slot / iqn / "control").write_text(f"udev_path={device}")
            if stage == "enabled":
                (slot / iqn / "enable").write_text("1")
    house.target.ensure_export(export)
    _is_right(house, export)
    house.clear()
    assert os.listdir(lio / "core") == ["alua"]


def test_what_others_made_is_told_and_left_alone(house: House, lio: Path) -> None:
    export = house.export()
    stranger = house.directory / "stranger.raw"
    stranger.touch()
    house.files.append(stranger)
    os.truncate(stranger, MIB)
    disk = rtslib.FileIOStorageObject("disk", dev=str(stranger), size=MIB)
    twin = "iqn.2026-11.org.example.other:" + names.target_name(PREFIX, export.volume_id)[-36:]
    group = rtslib.TPG(rtslib.Target(rtslib.FabricModule("iscsi"), twin), 1)
    rtslib.LUN(group, 1, disk)
    ours = f"iblock_{lio_configfs.slots(export.volume_id)[0]}"
    for squatter in ("squatter", names.target_name("iqn.2026-11.org.example.other", export.volume_id)):
        (lio / "core" / ours).mkdir(exist_ok=True)
        (lio / "core" / ours / squatter).mkdir()
    before = _picture(lio)
    house.target.ensure_export(export)
    _is_right(house, export)
    house.clear()
    assert _picture(lio) == before
    assert house.target.foreign() == [twin, "fileio_0/disk", *sorted(f"{ours}/{name}" for name in ("squatter", twin))]
    assert house.target.inventory() == []
    for squatter in ("squatter", twin):
        (lio / "core" / ours / squatter).rmdir()


def _picture(lio: Path) -> dict[str, str]:
    """All of configfs that does not count anything."""
    files = (path for top in ("core", "iscsi") for path in (lio / top).rglob("*"))
    return {str(path): _content(path) for path in files if path.is_file() and "statistics" not in str(path)}


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        return str(error.errno)


def test_an_errand_that_comes_late_deletes_nothing_that_was_made_meanwhile(house: House) -> None:
    """One that has waited for a peer, while another hand has let its initiator in again or made the group anew."""
    export = house.exported()
    volume = lio_configfs.Volume(export.volume_id, names.target_name(PREFIX, export.volume_id))
    acl, former = volume.acl_path(export.connections[0].initiator), os.stat(volume.group).st_ino
    assert Errands().run("late", [("rmdir", acl)], 60)
    _is_right(house, export)
    house.clear()
    wait_until(lambda: not os.path.isdir(volume.target))
    house.target.ensure_export(export)
    lio_errand_runner.take("delete", volume.group, former)
    _is_right(house, export)
    house.clear()
