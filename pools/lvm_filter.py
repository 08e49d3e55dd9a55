"""Which devices lvm(8) may look into: never a guest's disk, where a guest can make a volume group of any name.

A file volume that LIO exports is a loop device, and a thin volume is a logical volume. One with a volume group of the
pool's name in it would make that name mean two, and lvm(8) then works with neither.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blockdev.command import Output, run
from blockdev.loop import attached

ADVICE = 'devices { global_filter = [ "r|^/dev/loop|" ] }'
"""What a site's lvm.conf(5) should say where guests' disks are loop devices."""
NO_UDEV_LIST = "devices{obtain_device_list_from_udev=0}"
_EVERYTHING = '["a|.*|"]'
_VOLUMES = "r|^/dev/mapper/.*-stratus--[vstr]--|"


@dataclass(frozen=True)
class Filter:
    """Ours, in a list of lvm.conf(5) that the site does not use: a device has to pass `filter` and `global_filter`.

    If it uses both, ours stands before the site's in `filter`. `site` is that, as lvm.conf has it.
    """

    key: str = "global_filter"
    site: str = ""

    @classmethod
    def beside_the_site(cls, ask: Callable[..., Output]) -> Filter:
        """`ask` runs a command. Raises CommandError."""
        output = ask("lvm", "lvmconfig", "--typeconfig", "full", "devices/filter", "devices/global_filter").stdout
        lists = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        for key in ("global_filter", "filter"):
            if lists[key] == _EVERYTHING:
                return cls(key)
        return cls("filter", lists["filter"].strip("[]"))

    def config(self) -> str:
        """For --config of one command. A loop device that comes after this was made is not looked into either."""
        ours = (f"a|^/dev/{name}(p[0-9]+)?$|" for name in _lasting_loops())
        patterns = [f'"{pattern}"' for pattern in (*ours, "r|^/dev/loop|", _VOLUMES)]
        return f"devices{{{self.key}=[{', '.join([*patterns, *filter(None, [self.site])])}]}}"


def _lasting_loops() -> Iterator[str]:
    """The loop devices that an admin has made: all of ours detach themselves, see blockdev.loop."""
    for flag in Path("/sys/block").glob("loop*/loop/autoclear"):
        with suppress(OSError):  # detached just now
            if flag.read_text().strip() == "0":
                yield flag.parts[3]


def site_looks_into_loops() -> bool:
    """Whether lvm(8) does, as this host has it set up: tried with an empty one. Raises CommandError, OSError."""
    with tempfile.TemporaryDirectory(prefix="stratus-doctor-") as directory:
        file = Path(directory) / "disk"
        with file.open("wb") as disk:
            disk.truncate(4 << 20)  # one below pv_min_size is never looked into
        with attached(file) as device:
            output = run(["lvm", "pvscan", "--config", NO_UDEV_LIST, "--cache", str(device)], timeout=30)
    return "excluded" not in output.stdout + output.stderr
