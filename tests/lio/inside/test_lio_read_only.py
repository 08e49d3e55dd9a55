"""Readers that try to write: LIO believes an initiator that says its command reads, so what lies below must refuse."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import rtslib_fb as rtslib

from iscsi import lio_configfs, names
from iscsi.lio_backstores import storage_object
from iscsi.target import Export, TargetBusy
from pools.lvm import LvmPool
from tests.lio.inside.lio_house import MIB, PREFIX, House
from tests.support.initiator import InitiatorError, wait_until

SIZE = 4 * MIB
BLOCKS = 2048
_AT_0 = bytes(8) + BLOCKS.to_bytes(4, "big") + bytes(2)  # the rest of a command with 16 bytes

#: Commands that write, from block 0 on, and the bytes of data each one has.
COMMANDS = {
    "WRITE SAME (10) with UNMAP": (b"\x41\x08\0\0\0\0\0\x08\0\0", 512),
    "WRITE SAME (16) with UNMAP": (b"\x93\x08" + _AT_0, 512),
    "WRITE SAME (16) with UNMAP and no data": (b"\x93\x08" + _AT_0, 0),
    "WRITE SAME (16) with UNMAP and NDOB": (b"\x93\x09" + _AT_0, 0),
    "WRITE SAME (10)": (b"\x41\0\0\0\0\0\0\x08\0\0", 512),
    "WRITE SAME (16)": (b"\x93\0" + _AT_0, 512),
    "UNMAP": (b"\x42\0\0\0\0\0\0\0\x18\0", 24),
    "COMPARE AND WRITE": (b"\x89\0" + bytes(8) + b"\0\0\0\1\0\0", 1024),
    "WRITE (10)": (b"\x2a\0\0\0\0\0\0\0\x08\0", 4096),
    "WRITE (16)": (b"\x8a\0" + bytes(8) + b"\0\0\0\x08\0\0", 4096),
    "WRITE AND VERIFY (10)": (b"\x2e\0\0\0\0\0\0\0\x08\0", 4096),
}
#: What the initiator says of the direction of the data (RFC 7143 §11.3.1): R, W, neither, both.
DIRECTIONS = {"reads": 0xC1, "writes": 0xA1, "has none": 0x81, "does both": 0xE1}


@pytest.fixture
def volume(house: House, active: LvmPool) -> Iterator[Path]:
    """A thin volume full of 0x5a."""
    volume_id = uuid4()
    active.create(volume_id, SIZE)
    path = active.backing(volume_id).path
    _fill(path)
    yield path
    house.clear()
    active.delete_volume(volume_id)


@pytest.fixture(params=["file", "thin"])
def backing(request: pytest.FixtureRequest, house: House) -> Path:
    """The same, or a file."""
    if request.param == "thin":
        return request.getfixturevalue("volume")  # type: ignore[no-any-return]
    path = house.directory / f"{uuid4()}.raw"
    house.files.append(path)
    _fill(path)
    return path


def _fill(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"\x5a" * SIZE)
        os.fsync(file.fileno())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_that_a_reader_sends_changes_a_byte(house: House, backing: Path, direction: str) -> None:
    export = house.exported(size=SIZE, path=backing, read_only=True)
    for name in COMMANDS:
        _send(house, export, name, direction)
        assert _is_untouched(house, export), name
    house.clear()


def test_the_same_commands_of_a_writer_do(house: House, backing: Path) -> None:
    """So the above looks for what can be seen."""
    for name in ("WRITE SAME (10) with UNMAP", "WRITE SAME (16) with UNMAP", "WRITE SAME (16)"):
        export = house.exported(size=SIZE, path=backing)
        _send(house, export, name, "reads")
        assert not _is_untouched(house, export), name
        house.clear()
        _fill(backing)


def _made_anew(house: House, export: Export) -> bool:
    with contextlib.suppress(TargetBusy):  # what there was is being deleted, which takes long in a slow kernel
        house.target.ensure_export(export)
        return True
    return False


def _send(house: House, export: Export, name: str, direction: str) -> None:
    """On a connection of its own, which LIO may close."""
    cdb, length = COMMANDS[name]
    with house.initiator(export).bare() as bare, contextlib.suppress(InitiatorError, OSError):
        bare.command(cdb, length, DIRECTIONS[direction], bytes(length) if DIRECTIONS[direction] & 0x20 else b"")


def _is_untouched(house: House, export: Export) -> bool:
    with house.initiator(export).bare() as bare:
        return bare.command(b"\x28\0\0\0\0\0\0\x08\0\0", MIB) == b"\x5a" * MIB  # READ (10) of BLOCKS


def test_a_read_only_export_grows_and_can_be_written_next(house: House, active: LvmPool) -> None:
    """And the volume can be deleted the moment it is detached: nothing keeps it open."""
    for _ in range(3):
        volume_id = uuid4()
        active.create(volume_id, SIZE)
        path = active.backing(volume_id).path
        export = house.exported(size=SIZE, path=path, read_only=True)
        assert (house.target.inventory()[0].complete, house.target.inventory()[0].path) == (True, path)
        assert house.target.altered(export) == []
        active.resize(volume_id, 2 * SIZE)
        grown = Export(export.volume_id, export.tid, path, 2 * SIZE, True, export.connections)
        house.target.grow(grown)
        assert house.initiator(export).size() == 2 * SIZE
        written = Export(export.volume_id, export.tid, path, 2 * SIZE, False, export.connections)
        house.clear()
        house.target.ensure_export(written)
        house.initiator(export).write(0, 1, MIB)
        house.clear()
        house.target.ensure_export(grown)
        with pytest.raises(InitiatorError):
            house.initiator(export).write(0, 2, MIB)
        house.initiator(export).read(0, MIB, 1)
        house.clear()
        active.delete_volume(volume_id)


def test_a_read_only_export_that_a_reader_could_wipe_is_not_whole(house: House, active: LvmPool, volume: Path) -> None:
    """The device itself behind a backstore that says it is read-only, as a hand might make it."""
    export = house.exported(size=SIZE, path=volume, read_only=True)
    name = names.target_name(PREFIX, export.volume_id)
    (found,) = Path(lio_configfs.CORE).glob(f"iblock_*/{name}")
    (link,) = Path(lio_configfs.FABRIC, name, "tpgt_1/lun/lun_1").glob("tid-*")
    hba = int(found.parent.name.removeprefix("iblock_"))
    link.unlink()
    storage_object(str(found)).delete()
    rtslib.BlockStorageObject(name, str(volume), names.serial(export.volume_id), readonly=True, index=hba)
    os.symlink(found, link)
    (state,) = house.target.inventory()
    assert (state.read_only, state.path, state.complete) == (True, None, False)
    wait_until(lambda: _made_anew(house, export), 60)
    _send(house, export, "WRITE SAME (16) with UNMAP", "reads")
    assert _is_untouched(house, export)
