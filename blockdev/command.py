"""Run one tool of the host, so that it never outlives the one who waits for it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

GRACE = 2.0
"""Seconds that a tool has to obey SIGTERM."""


class CommandError(Exception):
    """A tool could not do its work."""


class CommandMissing(CommandError):
    """The tool is not installed, or not in PATH."""

    def __init__(self, tool: str) -> None:
        super().__init__(f"{tool}: no such tool in PATH; install it")
        self.tool = tool


class CommandFailed(CommandError):
    """The tool ended with an exit code other than 0 (negative: the number of the signal that ended it)."""

    def __init__(self, argv: Sequence[str], returncode: int, stdout: str, stderr: str) -> None:
        said = stderr.strip() or stdout.strip() or "it said nothing"
        super().__init__(f"{shlex.join(argv)}: exit code {returncode}: {said}")
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class CommandTimeout(CommandError):
    """The tool did not end in time. It was killed and reaped, or told to end (see `run`)."""

    def __init__(self, argv: Sequence[str], timeout: float, ending: signal.Signals = signal.SIGKILL) -> None:
        what = "killed" if ending == signal.SIGKILL else f"sent {ending.name}"
        super().__init__(f"{shlex.join(argv)}: {what}, not done within {timeout:g} s")
        self.argv = tuple(argv)
        self.timeout = timeout


@dataclass(frozen=True)
class Output:
    """What a tool wrote; bytes that are not UTF-8 are kept as surrogate escapes."""

    stdout: str
    stderr: str


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    input: str | None = None,
    pass_fds: Iterable[int] = (),
    env: Mapping[str, str] | None = None,
    ending: signal.Signals = signal.SIGKILL,
) -> Output:
    """Run `argv` to its end and return what it wrote.

    The tool dies with the thread that called us, even one that was SIGKILLed: prctl(2), PR_SET_PDEATHSIG, set by
    setpriv(1) because Python code between fork and exec is unsafe with threads. A process that dies in the
    microseconds before setpriv's prctl leaves the tool running: outside acts therefore also pass the descriptor of
    their lock in `pass_fds`, so that a successor waits for the tool's end.

    `ending` is the signal of that death and of the timeout. A tool that must not be cut off in the middle of its work
    gets SIGTERM, it alone: lvm(8) has devices suspended there, and all signals but SIGKILL blocked. If it has not ended
    GRACE seconds after a timeout it is left to run on, with what it got in `pass_fds`.

    `timeout` is in seconds. stdin is /dev/null, or `input`. `env` is added to our environment, and messages are in
    English (LC_ALL=C) for those who read them. No secret belongs in `argv`: every user of the host sees it in ps(1),
    and our errors repeat it.

    Raises CommandFailed, CommandTimeout, CommandMissing.
    """
    leash = [tool("setpriv"), "--pdeathsig", ending.name.removeprefix("SIG"), "--"]
    process = subprocess.Popen(
        [*leash, tool(argv[0]), *argv[1:]],
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",
        pass_fds=tuple(pass_fds),
        env={**os.environ, "LC_ALL": "C", **(env or {})},
        process_group=0,
    )
    try:
        stdout, stderr = process.communicate(input, timeout)
    except subprocess.TimeoutExpired:
        _end(process, ending)
        raise CommandTimeout(argv, timeout, ending) from None
    except BaseException:
        _end(process, ending)
        raise
    if process.returncode != 0:
        raise CommandFailed(argv, process.returncode, stdout, stderr)
    return Output(stdout, stderr)


def tool(name: str) -> str:
    """The full path of a tool. Raises CommandMissing when it is not in PATH."""
    path = shutil.which(name)
    if path is None:
        raise CommandMissing(name)
    return path


def _end(process: subprocess.Popen[str], ending: signal.Signals) -> None:
    """Kill the tool with its own children, or ask the tool to end. It is not reaped yet (that is what we failed to wait
    for), so its process group cannot have become somebody else's."""
    if process.returncode is None:
        (os.killpg if ending == signal.SIGKILL else os.kill)(process.pid, ending)
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        with suppress(BrokenPipeError):
            pipe.close()
    try:
        process.wait(None if ending == signal.SIGKILL else GRACE)
    except subprocess.TimeoutExpired:
        threading.Thread(target=process.wait, daemon=True).start()  # reaped whenever it ends
