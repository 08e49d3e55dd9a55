"""What the kernel says of device-mapper devices: read in /sys, so that no device is opened and nobody waits."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512


@dataclass(frozen=True)
class Device:
    """A device that is there: the UUID that device-mapper knows it by, and its size in bytes.

    All I/O to one that is `suspended` waits until it is resumed.
    """

    path: Path
    uuid: str
    size: int
    suspended: bool


@dataclass(frozen=True)
class ThinPoolStatus:
    """What the thin pool itself tells. `mode` is rw, out_of_data_space or ro; `held`: a metadata snapshot exists;
    `transaction`: the last of LVM's changes that has arrived.
    """

    used_chunks: int
    chunks: int
    metadata_percent: float
    held: bool
    mode: str
    needs_check: bool
    transaction: int = 0

    @classmethod
    def parse(cls, text: str) -> ThinPoolStatus:
        """The line of dmsetup-status(8); its fields: Linux, drivers/md/dm-thin.c, pool_status."""
        words = text.split()[3:]
        if len(words) < 5:  # "Fail" or "Error" stand alone
            return cls(0, 0, 0.0, held=False, mode=" ".join(words), needs_check=True)
        used_metadata, metadata = map(int, words[1].split("/"))
        used, chunks = map(int, words[2].split("/"))
        percent = 100 * used_metadata / metadata
        held, needs_check = words[3] != "-", "needs_check" in words
        return cls(used, chunks, percent, held, words[4], needs_check, transaction=int(words[0]))

    @property
    def broken(self) -> bool:
        """Whether it has stopped changing: nothing can be made, removed or given a first write any more."""
        return self.needs_check or self.mode not in ("rw", "out_of_data_space")


def node(group: str, name: str, suffix: str = "") -> Path:
    """The device node of a logical volume, or with LVM's suffix that of a part of it."""
    return Path("/dev/mapper") / f"{group.replace('-', '--')}-{name.replace('-', '--')}{suffix}"


def find_device(path: Path) -> Device | None:
    """The device-mapper device whose node is `path`; None when there is none, or the node is of another device.

    Without udev a node can outlive its device, and its number can be given to another.
    """
    try:
        found = path.stat()
        home = Path("/sys/dev/block") / f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        if not stat.S_ISBLK(found.st_mode) or (home / "dm/name").read_text().strip() != path.name:
            return None
        uuid, suspended = ((home / "dm" / name).read_text().strip() for name in ("uuid", "suspended"))
        return Device(path, uuid, int((home / "size").read_text()) * SECTOR, suspended != "0")
    except FileNotFoundError:
        return None
