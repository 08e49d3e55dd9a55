"""Growing a volume while it is written to."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from iscsi.target import Export, TargetRefused
from tests.lio.inside.lio_house import MIB, House, Interrupted, interrupt_at
from tests.support.initiator import Writer, lost
from tests.support.thinpools import ThinPool, lvm


def _longer(export: Export, by: int = MIB) -> Export:
    """The export after its file was extended."""
    os.truncate(export.path, export.size + by)
    return dataclasses.replace(export, size=export.size + by)


def test_the_initiator_sees_a_grown_file_after_a_rescan(house: House, iscsid: None) -> None:
    export = house.exported()
    with house.kernel(export) as kernel, Writer(house.initiator(export)) as writer:
        sessions = house.target.sessions()
        for _ in range(10):
            export = _longer(export)
            house.target.grow(export)
        assert house.target.inventory()[0].size == export.size
        kernel.rescan()
        assert kernel.size == export.size
        with kernel.device.open("r+b", buffering=0) as device:
            device.seek(export.size - 4096)
            device.write(b"\5" * 4096)
            os.fsync(device.fileno())
        writer.wait_rounds(1)
        assert house.target.sessions() == sessions
        assert writer.stop() == []
    assert lost(export.path, writer.expected) == []
    assert export.path.read_bytes()[-4096:] == b"\5" * 4096


def test_the_initiator_sees_a_grown_block_device_after_a_rescan(
    house: House, pool_group: ThinPool, iscsid: None
) -> None:
    lvm("lvcreate", "--thin", "--virtualsize", "32m", "--name", "grows", str(pool_group.path))
    try:
        export = house.exported(path=Path("/dev", pool_group.group, "grows"), size=32 * MIB)
        with house.kernel(export) as kernel:
            lvm("lvextend", "--size", "48m", f"{pool_group.group}/grows")
            with pytest.raises(TargetRefused, match="bytes, not"):
                house.target.grow(export)
            export = dataclasses.replace(export, size=48 * MIB)
            house.target.grow(export)
            kernel.rescan()
            assert kernel.size == 48 * MIB
            assert house.target.inventory()[0].size == 48 * MIB
            assert house.target.inventory()[0].path == export.path
        house.target.remove(export.volume_id)
    finally:
        lvm("lvremove", "--yes", f"{pool_group.group}/grows")


def test_ensure_export_grows_what_has_another_size(house: House) -> None:
    longer = _longer(house.exported(), by=512)
    with pytest.raises(Interrupted):
        house.another(trace=interrupt_at(1, [])).ensure_export(longer)
    house.target.ensure_export(longer)
    assert house.initiator(longer).size() == longer.size
