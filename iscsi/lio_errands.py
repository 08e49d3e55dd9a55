"""Changes of configfs that may wait for a peer or for a device, made by one small process that stays.

A thread that waits inside the kernel cannot be killed, and keeps its process, with all locks and descriptors, from
ending. So ours does not wait: `lio_errand_runner` does, a process that inherits nothing of us and takes no further step
once we are gone. Nobody has to remember an errand: what it has changed, or not yet, is seen in configfs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

RUNNER = Path(__file__).with_name("lio_errand_runner.py")

_START = 30.0  # seconds; nobody's patience is spent on the start of an interpreter

Step = tuple[str, ...]
"""(act, directory, arguments of the act); see the runner."""


class Errands:
    """At most one for each `what`, a path. The runner is started for the first one, and goes with this object."""

    def __init__(self) -> None:
        self._runner: _Runner | None = None
        self._numbers = itertools.count()
        self._running: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self, what: str, steps: Sequence[Step], patience: float) -> bool:
        """Have the steps taken, unless an errand runs for `what`; whether it is over, after `patience` seconds at most.

        A directory that is not there now, or is another one by then, is left out.
        """
        with self._lock:
            self._hear(0)
            if what in self._running:
                return False
            self._runner = self._runner or _Runner()
            self._running[what] = number = next(self._numbers)
            self._runner.ask([number, _meant(steps)])
            return self._is_over(what, patience)

    def running(self, what: str) -> bool:
        with self._lock:
            self._hear(0)
            return what in self._running

    def _is_over(self, what: str, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while what in self._running:
            if not self._hear(max(0, deadline - time.monotonic())):
                return False
        return True

    def _hear(self, patience: float) -> bool:
        """Wait for word of the runner; whether there was any. One that somebody killed has no errands any more."""
        over = self._runner.over(patience) if self._runner else []
        if over is None:
            self._runner, self._running = None, {}
            return False
        self._running = {what: number for what, number in self._running.items() if number not in over}
        return bool(over)


class _Runner:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(RUNNER)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # reaped whenever it ends
        self._part = b""
        self.over(_START)

    def ask(self, request: list[object]) -> None:
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(json.dumps(request).encode() + b"\n")

    def over(self, patience: float) -> list[int] | None:
        """The errands that are over, after `patience` seconds at most; None when the runner has ended."""
        if not select.select([self._socket], [], [], patience)[0]:
            return []
        data = b""
        with contextlib.suppress(ConnectionError):
            data = self._socket.recv(1 << 16)
        *whole, self._part = (self._part + data).split(b"\n")
        return list(map(int, whole)) if data else None


def _meant(steps: Sequence[Step]) -> list[list[object]]:
    """Each step with the inode of its directory."""
    found: list[list[object]] = []
    for act, directory, *arguments in steps:
        with contextlib.suppress(OSError):
            found.append([act, directory, os.stat(directory).st_ino, *arguments])
    return found
