"""Benchmarks of LIO and LVM: run in a kernel of their own, as the tests of both are; their tables come back as JSON.

    python -m bench lio-… ─▶ tests.lio.kernel ─▶ python -m bench.inside_kernel lio-… ─▶ $STRATUS_RESULTS/tables.json

The kernel runs in user mode on one CPU, and LVM's devices lie in its memory: every command and every system call is
dearer than on metal, and no disk is slow. Ratios of what ran in the same kernel say something, rates by themselves do
not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import cast

from bench import targetd
from bench.report import Table, machine
from tests.lio.kernel import INSIDE, run
from tests.lio.uml import Uml

NAMES = ("lio-rebuild", "lio-io", "lio-cycles")
TIMEOUT = 1800.0
MEMORY = 3072  # MiB; the volumes lie in it
MODULES = ("configfs", "target_core_mod", "target_core_iblock", "iscsi_target_mod", "loop", "dm_thin_pool", "sd_mod",
           "iscsi_tcp")  # fmt: skip
CONFIGFS = Path("/sys/kernel/config")
#: For every side alike: there is no udevd that LVM could wait for.
LVM_CONFIG = """
activation { udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0 }
devices { obtain_device_list_from_udev=0 use_devicesfile=0 }
"""
_TABLES = "tables.json"


def bring(name: str, work: Path, *, quick: bool) -> list[Table]:
    """The tables of the benchmark `name`, run in a new kernel.

    Raises RuntimeError when it fails; EngineMissing, KernelFailed.
    """
    if name == "lio-cycles":
        targetd.checkout()
    argv = [sys.executable, "-m", "bench.inside_kernel", name, *(["--quick"] if quick else [])]
    if code := run(Uml(), argv, work, timeout=TIMEOUT, memory=MEMORY):
        raise RuntimeError(f"{name} failed in the test kernel: exit code {code}")
    return [Table(**each) for each in json.loads((work / _TABLES).read_text(encoding="utf-8"))]


def main() -> None:
    if os.environ.get(INSIDE) != "1":
        sys.exit("this changes the kernel it runs in: run `python -m bench lio-cycles`, for instance")
    name, quick = sys.argv[1], "--quick" in sys.argv
    _prepare()
    work = Path(os.environ["TMPDIR"], "bench")
    work.mkdir()
    # It imports rtslib, which wants a configfs.
    tables = cast(list[Table], import_module(f"bench.{name.replace('-', '_')}").measure(work, quick=quick))
    tables[0].notes.append(f"In the test kernel: {machine(work)}.")
    text = json.dumps([asdict(table) for table in tables])
    Path(os.environ["STRATUS_RESULTS"], _TABLES).write_text(text, encoding="utf-8")


def _prepare() -> None:
    for module in MODULES:
        subprocess.run(["modprobe", module], check=True)
    subprocess.run(["mount", "-t", "configfs", "configfs", CONFIGFS], check=True)
    for directory in ("/etc/target", "/etc/rtslib-fb-target"):
        Path(directory).mkdir(exist_ok=True)
    with Path("/etc/lvm/lvmlocal.conf").open("a", encoding="utf-8") as file:
        file.write(LVM_CONFIG)


if __name__ == "__main__":
    main()
