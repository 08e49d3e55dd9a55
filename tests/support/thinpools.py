"""A real LVM thin pool on a loop device, made for a test and gone after it: for the test kernel, as root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blockdev.command import CommandFailed, run

#: LVM's own commands of the tests: there is no udevd, and no other device is looked at.
CONFIG = (
    "devices { use_devicesfile=0 scan_lvs=0 global_filter=[ \"a|^/dev/loop|\", \"r|.*|\" ] } "
    "activation { udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0 } global { use_lvmpolld=0 } "
    "backup { backup=0 archive=0 }"
)  # fmt: skip


@dataclass(frozen=True)
class ThinPool:
    """A volume group with nothing but a thin pool in it, on the loop device `device`."""

    group: str
    name: str
    device: Path

    @property
    def path(self) -> Path:
        """GROUP/POOL, as a pool's configuration names it."""
        return Path(self.group) / self.name


def lvm(*arguments: str) -> str:
    """One command of LVM, such as `lvm("lvs", "--noheadings", "-o", "lv_name", group)`; what it prints."""
    command, *rest = arguments
    return run([command, "--config", CONFIG, *rest], timeout=60).stdout


@contextmanager
def thin_pool(workdir: Path, group: str, size: int, metadata: int = 4 << 20) -> Iterator[ThinPool]:
    """A thin pool of `size` bytes of data in the new volume group `group`, in a sparse file in `workdir`."""
    image = workdir / f"{group}.img"
    with image.open("wb") as file:
        file.truncate(size + 2 * metadata + (16 << 20))  # a spare of the metadata, and LVM's own
    device = run(["losetup", "--find", "--show", str(image)], timeout=10).stdout.strip()
    try:
        lvm("vgcreate", group, device)
        lvm("lvcreate", "--type", "thin-pool", "--name", "pool", "--size", f"{size}b", "--poolmetadatasize",
            f"{metadata}b", "--zero", "y", group)  # fmt: skip
        lvm("lvchange", "--errorwhenfull", "y", f"{group}/pool")
        yield ThinPool(group, "pool", Path(device))
    finally:
        with suppress(CommandFailed):  # a test that failed may have left a volume open
            lvm("vgremove", "--force", "--yes", group)
        run(["losetup", "--detach", device], timeout=10)
        image.unlink()
