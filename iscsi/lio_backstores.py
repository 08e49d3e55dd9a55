"""Backstores: what LIO calls storage objects, over a block device, or over a loop device on a file or on what is read.

What rtslib-fb 2.2 and LIO do, and what follows:

- rtslib gives a new backstore the first free slot, and finds one by listing all; we name the slot. Deleting one walks
  through the LUNs of all targets; ours does not, for its LUN is gone by then.
- rtslib loads persistent reservations that an initiator once asked to keep (APTPL) into the new backstore of the same
  serial. The next machine would find the volume reserved by the last one: reservations end with the attachment.
- iblock ignores FUA where the device has none, but tells initiators that it is honoured, unless emulate_fua_write is
  off; then they flush instead. A loop device has none.
- LIO keeps a reader from writing by the direction that the initiator says its command's data has. WRITE SAME with UNMAP
  as a command that reads, or has no data, gets through, also to a read-only backstore: iblock discards all the same. So
  what is exported read-only lies behind a read-only loop device, also if it is a device; nothing gets through that.
- emulate_3pc would let an initiator have blocks copied between LUNs inside the target.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rtslib_fb as rtslib  # type: ignore[import-untyped]

from blockdev import loop
from iscsi import lio_configfs as configfs
from iscsi import names
from iscsi.lio_configfs import Backstore, Volume, put, write
from iscsi.target import Export, TargetRefused


class _StorageObject(rtslib.BlockStorageObject):  # type: ignore[misc]
    """rtslib's, without looking at other targets and without the reservations of the past."""

    def _gen_attached_luns(self) -> Iterator[Any]:
        return iter(())

    def _config_pr_aptpl(self) -> None:
        pass


rtslib.tcm.bs_params[_StorageObject] = rtslib.tcm.bs_params[rtslib.BlockStorageObject]  # it looks its class up there


def identity(volume: Volume) -> tuple[str, str, str, str]:
    """Unit serial, vendor, product, revision."""
    return names.serial(volume.id), "STRATUS", "VOLUME", "1"


def serves(backstore: Backstore, path: Path) -> bool:
    """Whether the backstore's device is `path`, or a loop device over it; the latter it is if it is read-only."""
    if backstore.device is None:
        return False
    with contextlib.suppress(OSError):
        wanted = path.stat()
        status = loop.status(backstore.node) if _is_loop(backstore) else None
        if stat.S_ISBLK(wanted.st_mode) and not backstore.read_only:
            return wanted.st_rdev == backstore.device
        if status is None or status.read_only != backstore.read_only:
            return False
        if stat.S_ISBLK(wanted.st_mode):
            return wanted.st_rdev == status.block
        return (status.device, status.inode) == (wanted.st_dev, wanted.st_ino)
    return False


def _is_loop(backstore: Backstore) -> bool:
    return backstore.node.name.startswith("loop")


class BackstoreLayer:
    """Writes the backstore of one volume. `trace` is called with the name of each step done."""

    def __init__(self, volume: Volume, trace: Callable[[str], None]) -> None:
        self._volume, self._trace = volume, trace

    def ensure(self, export: Export) -> Backstore:
        """The backstore there is must be right; see `is_right`."""
        found = self._volume.backstore() or self._create(export)
        put(f"{found.path}/attrib", attributes(found))
        if found.claim != str(export.path):
            write(f"{found.path}/udev_path", str(export.path))
        return found

    def is_right(self, found: Backstore, export: Export) -> bool:
        """Whether the backstore can stay: the rest of it can be changed in place."""
        made = found.enabled and found.identity == identity(self._volume)
        return made and found.read_only == export.read_only and serves(found, export.path)

    def ensure_size(self, found: Backstore, size: int) -> None:
        """Let initiators see the size of the backing. A block device tells it by itself, a loop device when asked."""
        if found.size == size:
            return
        if _is_loop(found):
            loop.grow(found.node)
            self._trace("grown")
        if found.size != size:
            raise TargetRefused("grow", 0, f"{found.node} has {found.size} bytes, not {size}")

    def delete(self) -> None:
        """And the loop device under it, if there is one, which goes with its last user."""
        for slot in configfs.slots(self._volume.id):
            hba = f"{configfs.CORE}/iblock_{slot}"
            if os.path.isdir(f"{hba}/{self._volume.iqn}"):
                storage_object(f"{hba}/{self._volume.iqn}").delete()
                self._trace("backstore deleted")
            elif os.path.isdir(hba) and not configfs.entries(hba):
                os.rmdir(hba)

    def _create(self, export: Export) -> Backstore:
        self.delete()
        slot = next((slot for slot in configfs.slots(self._volume.id) if not _taken(slot)), None)
        if slot is None:
            raise TargetRefused("create backstore", 0, "all slots of this volume are taken by others")
        with _device(export) as device:
            made = _StorageObject(
                self._volume.iqn, str(device), names.serial(self._volume.id), readonly=export.read_only, index=slot
            )
        self._trace("backstore")
        for name, value in zip(("vendor_id", "product_id", "revision"), identity(self._volume)[1:], strict=True):
            write(f"{made.path}/wwn/{name}", value)
        self._trace("identity")
        found = configfs.backstore(str(made.path))
        assert found
        return found


def storage_object(path: str) -> Any:
    """rtslib's object for the backstore in the directory `path`."""
    hba, name = os.path.split(path)
    return _StorageObject(name, index=int(hba.rpartition("_")[2]))


def _taken(slot: int) -> bool:
    return bool(configfs.entries(f"{configfs.CORE}/iblock_{slot}"))


@contextlib.contextmanager
def _device(export: Export) -> Iterator[Path]:
    if export.path.is_block_device() and not export.read_only:
        yield export.path
    else:
        with loop.attached(export.path, read_only=export.read_only) as device:
            yield device


def attributes(backstore: Backstore) -> dict[str, str]:
    discards = str(int(backstore.discards))
    return {
        "emulate_tpu": discards,
        "emulate_tpws": discards,
        "emulate_fua_write": str(int(backstore.honours_fua)),
        "emulate_3pc": "0",
    }
