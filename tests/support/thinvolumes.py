"""LVM pools of tests, looked at and changed behind the driver's back."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pools.lvm import LvmPool
from tests.support.thinpools import lvm

EXTENT = 4 << 20
"""The unit of sizes in a volume group that was not told another."""
CHUNK = 64 << 10
"""What a thin pool of that size gives out at once."""


def emptied(pool: LvmPool) -> None:
    """Remove all that is in the pool, finished or not."""
    lvm("lvremove", "--yes", "--select", f"tags=stratus && tags=stratus-pool-{pool.pool_id}", pool.path.parts[0])


def listed(group: str, *fields: str) -> dict[str, list[str]]:
    """The logical volumes of the group that are no part of another, by name, with these fields of lvs(8)."""
    output = lvm("lvs", "--noheadings", "--separator", "|", "--options", ",".join(("lv_name", *fields)), group)
    rows = [[word.strip() for word in line.split("|")] for line in output.splitlines()]
    return {name: rest for name, *rest in rows}


@contextmanager
def running_udevd() -> Iterator[None]:
    """udev, which makes the nodes of devices where it runs. For the test kernel: it changes /dev and /run."""
    daemon = subprocess.Popen(["/lib/systemd/systemd-udevd"])
    try:
        while not Path("/run/udev/control").exists():
            assert daemon.poll() is None, "udevd has ended"
            time.sleep(0.02)
        yield
    finally:
        daemon.terminate()
        daemon.wait(30)
        Path("/run/udev/control").unlink(missing_ok=True)
