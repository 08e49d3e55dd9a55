"""Growing a volume while it is written to."""

from __future__ import annotations

import dataclasses
import os

import pytest

from iscsi.target import Export, TargetBusy
from iscsi.tgt import TgtTarget
from tests.iscsi.conftest import MIB, PREFIX, Brake, House
from tests.support.initiator import Writer, lost, wait_until


def _longer(export: Export, by: int = MIB) -> Export:
    """The export after its file was extended."""
    os.truncate(export.path, export.size + by)
    return dataclasses.replace(export, size=export.size + by)


def test_fifty_grows_under_a_queue_of_writes(house: House) -> None:
    export = house.exported(size=16 * MIB)
    identity = house.initiator(export).vpd(0x83)
    with Writer(house.initiator(export)) as writer:
        for _ in range(50):
            export = _longer(export)
            house.target.grow(export)
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert lost(export.path, writer.expected) == []
    assert house.initiator(export).size() == 66 * MIB
    assert house.initiator(export).vpd(0x83) == identity
    house.initiator(export).write(65 * MIB, 9, MIB)
    house.initiator(export).read(65 * MIB, MIB, 9)


@pytest.mark.parametrize("step", ["withdrawn", "offline", "path", "online"])
def test_an_interrupted_grow_is_completed(house: House, step: str) -> None:
    """The initiator waits meanwhile, and goes on without an error."""

    class Interrupted(Exception):
        pass

    def trace(done: str) -> None:
        if done == step:
            raise Interrupted

    export = house.exported()
    with Writer(house.initiator(export)) as writer:
        longer = _longer(export)
        with pytest.raises(Interrupted):
            TgtTarget(house.daemon.ipc, PREFIX, trace=trace).grow(longer)
        assert not house.target.inventory()[0].complete
        house.target.ensure_export(longer)
        state = house.target.inventory()[0]
        assert (state.complete, state.online, state.size) == (True, True, longer.size)
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert house.initiator(longer).size() == longer.size


def test_ensure_export_grows_what_has_another_size(house: House) -> None:
    export = house.exported()
    with Writer(house.initiator(export)) as writer:
        longer = _longer(export)
        house.target.ensure_export(longer)
        writer.wait_rounds(1)
        assert writer.stop() == []
    assert house.initiator(longer).size() == longer.size


def test_sizes_that_tgtd_rounds_alike_are_grown_too(house: House) -> None:
    export = house.exported()
    longer = _longer(export, by=512)
    house.target.grow(longer)
    assert house.initiator(longer).size() == longer.size


def test_a_grow_that_cannot_drain_lets_the_initiator_back_in(slow_house: House, brake: Brake) -> None:
    house, export = slow_house, slow_house.exported()
    with Writer(house.initiator(export), depth=1) as writer:
        brake.on()
        wait_until(brake.holds)
        longer = _longer(export)
        with pytest.raises(TargetBusy):
            TgtTarget(house.daemon.ipc, PREFIX, patience=0.1).grow(longer)
        brake.off()
        writer.wait_rounds(2)
        assert house.initiator(export).size() == export.size
        house.target.grow(longer)
        writer.wait_rounds(2)
        assert writer.stop() == []
    assert house.initiator(longer).size() == longer.size
