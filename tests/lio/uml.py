"""The everyday engine: Debian's user-mode-linux, a whole kernel as one process, up in a few seconds."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.lio.kernel import HERE, Boot, EngineMissing, Job

_MODULES = Path("/usr/lib/uml/modules")
_INSTALL = "as root: apt-get install --no-install-recommends user-mode-linux gcc libc6-dev kmod iproute2"


class Uml:
    """See `kernel.Engine`."""

    name = "uml"

    def boot(self, job: Job) -> Boot:
        kernel, modules = _installed()
        shutil.copy(HERE / "init.sh", job.directory)
        (job.directory / "init.sh").chmod(0o755)
        # Its processes wait for one another: on one CPU they are twice as fast. Several kernels spread.
        cpus = sorted(os.sched_getaffinity(0))
        argv = [
            "taskset", "-c", str(cpus[os.getpid() % len(cpus)]),
            kernel, f"mem={job.memory}M", f"umid={job.directory.name}", f"uml_dir={job.directory}",
            "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
            f"init={job.directory}/init.sh", f"stratus_job={job.directory}",
            "con=null", "con0=null,fd:1", "con1=null,fd:1", "quiet", "panic=1",
        ]  # fmt: skip
        environment = {"TMPDIR": str(_memory_place(job.memory << 20)), "LD_PRELOAD": str(_shim(job.directory))}
        return Boot(argv, environment, modules)


def _installed() -> tuple[str, Path]:
    kernel = shutil.which("linux.uml")
    missing = [tool for tool in ("gcc", "modprobe", "setpriv", "unshare") if shutil.which(tool) is None]
    releases = sorted(_MODULES.glob("*/modules.dep"))
    if kernel is None or not releases or missing:
        lacking = ", ".join([*([] if kernel and releases else ["user-mode-linux"]), *missing])
        raise EngineMissing(f"the user-mode kernel needs what is not here ({lacking}); {_INSTALL}")
    return kernel, releases[-1].parent


def _shim(directory: Path) -> Path:
    """The library that linux.uml wants preloaded on some CPUs, compiled into `directory`."""
    library = directory / "uml-shim.so"
    source = HERE / "uml-shim.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def _memory_place(size: int) -> Path:
    """A directory for the file that is the kernel's memory: it must have room, and allow executable mappings."""
    places = [Path("/dev/shm"), Path(tempfile.gettempdir()), Path("/var/tmp")]
    for place in places:
        if place.is_dir() and shutil.disk_usage(place).free > size and _may_execute(place):
            return place
    said = ", ".join(map(str, places))
    raise EngineMissing(f"none of {said} has {size >> 20} MiB free and allows executable mappings (is not noexec)")


def _may_execute(place: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            os.ftruncate(file.fileno(), mmap.PAGESIZE)
            mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True
