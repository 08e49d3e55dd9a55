"""What an operator's script does with lvcreate(8) and rtslib to give a machine a volume and take it back:

    python -m bench.lio_bare GROUP/POOL NUMBER SIZE LOCK

It writes "ready", and then goes through a cycle and writes "done" for each line that it reads. It records nothing,
checks nothing and cannot be interrupted. rtslib knows no locks: as many scripts as there are take turns by the file
LOCK, and each has a backstore number of its own, for rtslib remembers which ones were free.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rtslib_fb as rtslib  # type: ignore[import-untyped]

from blockdev.locks import FileLock

PREFIX = "iqn.2004-10.com.example:bare"
HOST, PORT = "127.0.0.1", 3262
INITIATOR = "iqn.2004-10.com.example:bench"
USERNAME, PASSWORD = "user", "0123456789abcdef"
LUN = 1


@dataclass
class Bare:
    """An export by hand: a target with CHAP for one initiator, and all else as rtslib and LIO have it."""

    backstore: Any
    target: Any
    group: Any

    @classmethod
    def make(cls, name: str, device: Path, number: int) -> Bare:
        backstore = rtslib.BlockStorageObject(name, dev=str(device), index=number)
        target = rtslib.Target(rtslib.FabricModule("iscsi"), f"{PREFIX}.{name}")
        group = rtslib.TPG(target, 1)
        group.set_attribute("authentication", "1")
        rtslib.LUN(group, LUN, backstore)
        acl = rtslib.NodeACL(group, INITIATOR)
        rtslib.MappedLUN(acl, LUN, LUN, write_protect=False)
        acl.chap_userid, acl.chap_password = USERNAME, PASSWORD
        rtslib.NetworkPortal(group, HOST, PORT)
        group.enable = True
        return cls(backstore, target, group)

    def remove(self) -> None:
        self.target.delete()
        self.backstore.delete()


def lvm(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def create_volume(pool: str, name: str, size: int) -> Path:
    """The device of a new thin volume; `pool` is GROUP/POOL."""
    lvm("lvcreate", "--name", name, "--virtualsize", f"{size}b", "--thinpool", pool, "--wipesignatures", "n")
    return Path("/dev", pool.partition("/")[0], name)


def delete_volume(pool: str, name: str) -> None:
    lvm("lvremove", "--yes", f"{pool.partition('/')[0]}/{name}")


def cycle(pool: str, number: int, size: int, lock: Path) -> None:
    name = f"bare-{number}"
    device = create_volume(pool, name, size)
    with FileLock(lock):
        made = Bare.make(name, device, number)
    with FileLock(lock):
        made.remove()
    delete_volume(pool, name)


def main() -> None:
    pool, number, size, lock = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    print("ready", flush=True)
    for _ in sys.stdin:
        cycle(pool, number, size, lock)
        print("done", flush=True)


if __name__ == "__main__":
    main()
