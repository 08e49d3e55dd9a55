"""Runs a command in a kernel of its own, on this host's root, and brings back its output, exit code and files.

The host's root is there read-only, with a tmpfs over it, so whatever the command writes is gone with the kernel; only
what it puts into the directory that STRATUS_RESULTS names comes back. The kernel, with everything in it, dies with the
one who waits for it: by a timeout, by Ctrl-C, by SIGKILL.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]
#: Set in the test kernel, and nowhere else.
INSIDE = "STRATUS_TEST_KERNEL"
#: Where the job's directory is, in the kernel.
JOB = "/run/job"
HERE = Path(__file__).parent
_LAST_WORDS = 10.0


class EngineMissing(Exception):
    """This host cannot run the kernel; the message says what to install."""


class KernelFailed(Exception):
    """The kernel ended, or was ended, without the command's exit code; the message has the end of its console."""


@dataclass(frozen=True)
class Job:
    """What is to be run, and with what. `memory` is in MiB, `places` are directories that must be there.

    directory/
      guest.sh, command.sh    what runs in the kernel
      settings                shell variables for the engine's init and guest.sh
      output, status          what the command writes, and its exit code once it has ended
      console                 what the kernel itself says while it runs
      hung                    made when the host will wait no longer, see guest.sh
      results/                the command's files that come back, and kernel.log
    """

    directory: Path
    memory: int
    places: tuple[Path, ...] = (ROOT, Path(sys.prefix), Path(sys.base_prefix))

    @property
    def console(self) -> Path:
        return self.directory / "console"

    def hidden_places(self) -> list[Path]:
        """Those that lie where the test kernel has directories of its own."""
        return [place for place in self.places if any(place.is_relative_to(top) for top in ("/dev", "/run"))]


@dataclass(frozen=True)
class Boot:
    """How an engine boots a kernel for one job.

    `argv` ends when the kernel does; what it writes goes to the job's console, `environment` is added to ours.
    `modules` is the directory of the kernel's modules.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    modules: Path


class Engine(Protocol):
    """What a kernel runs in."""

    name: str

    def boot(self, job: Job) -> Boot:
        """Make ready what a kernel for the job needs. Its process 1 is init.sh. Raises EngineMissing."""


def run(engine: Engine, command: Sequence[str], results: Path, *, timeout: float, memory: int = 1536) -> int:
    """Run `command` in the project's directory in a new kernel; returns its exit code, its output goes to stdout.

    `results` gets the files that the command put into STRATUS_RESULTS, coverage's data if it was measured, and
    kernel.log. Raises EngineMissing, KernelFailed.
    """
    _check_host()
    with tempfile.TemporaryDirectory(prefix=f"stratus-kernel-{os.getpid()}-") as directory:
        job = Job(Path(directory), memory)
        boot = engine.boot(job)
        _write(job, boot, command)
        try:
            _watch(job, _start(boot, job), timeout)
            return _status(job, f"the {engine.name} kernel ended by itself")
        finally:
            shutil.copytree(job.directory / "results", results, dirs_exist_ok=True)


def _check_host() -> None:
    if os.geteuid() != 0:
        raise EngineMissing("only root can show the whole of this host's root to another kernel: be root")
    if re.search(r"[\s:,]", tempfile.gettempdir()):
        raise EngineMissing("a kernel's command line takes no such TMPDIR: it must be without spaces, colons, commas")


def _write(job: Job, boot: Boot, command: Sequence[str]) -> None:
    shutil.copy(HERE / "guest.sh", job.directory)
    (job.directory / "results").mkdir()
    (job.directory / "output").touch()
    settings = {"modules": str(boot.modules), "places": ":".join(map(str, job.hidden_places()))}
    _write_lines(job.directory / "settings", _assignments(settings))
    lines = [f"export {line}" for line in _assignments(_environment())]
    lines += [f"cd {shlex.quote(str(ROOT))}", f"exec {shlex.join(command)}"]
    _write_lines(job.directory / "command.sh", lines)


def _environment() -> dict[str, str]:
    """What the command has in its environment: ours, with what differs in the test kernel."""
    return {
        **{name: value for name, value in os.environ.items() if name.isidentifier()},
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "HOME": "/root",
        "TMPDIR": "/run/tmp",
        "COVERAGE_FILE": f"{JOB}/results/coverage",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        INSIDE: "1",
        "STRATUS_RESULTS": f"{JOB}/results",
    }


def _assignments(values: Mapping[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(value)}" for name, value in values.items()]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _start(boot: Boot, job: Job) -> subprocess.Popen[bytes]:
    # A kernel's processes are several, and some outlive their parent: in a PID namespace none outlives the first.
    # Its first process dies with unshare, and unshare dies with us. It is a shell, since a signal does nothing to the
    # first process of a namespace, and linux.uml ends a panic by aborting, and by SIGTERM for its process group.
    leash = ["setpriv", "--pdeathsig", "KILL", "--", "prlimit", "--core=0", "--", "unshare"]
    leash += ["--pid", "--fork", "--kill-child=KILL", "--", "sh", "-c", 'setsid "$@"; exit $?', "kernel", "env"]
    variables = [f"{name}={value}" for name, value in boot.environment.items()]
    with job.console.open("wb") as console:
        return subprocess.Popen(
            [*leash, *variables, *boot.argv],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            process_group=0,  # Ctrl-C is for us
        )


def _watch(job: Job, process: subprocess.Popen[bytes], timeout: float) -> None:
    """Show the command's output until the kernel has ended. Raises KernelFailed past the timeout."""
    deadline = time.monotonic() + timeout
    try:
        with (job.directory / "output").open("rb") as output:
            while process.poll() is None:
                _show(output.read())
                if time.monotonic() > deadline:
                    _ask_what_hangs(job)
                    raise KernelFailed(f"not done within {timeout:g} s{_console(job)}")
                time.sleep(0.05)
            _show(output.read())
    finally:
        process.kill()
        process.wait()


def _ask_what_hangs(job: Job) -> None:
    """Give the kernel a few seconds to write kernel.log; one that hangs as a whole does not."""
    (job.directory / "hung").touch()
    deadline = time.monotonic() + _LAST_WORDS
    while not (job.directory / "results/kernel.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def _show(data: bytes) -> None:
    if data:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _status(job: Job, otherwise: str) -> int:
    try:
        return int((job.directory / "status").read_text())
    except FileNotFoundError:
        raise KernelFailed(otherwise + _console(job)) from None


def _console(job: Job) -> str:
    """The end of what the kernel said, for a message."""
    # Its own log has more than the console, but it is written only by a kernel that still runs.
    said = [job.directory / "results/kernel.log", job.console]
    text = next(path for path in said if path.exists()).read_text(errors="replace")
    return "; its last words:\n" + "\n".join(f"    {line}" for line in text.splitlines()[-80:])
