"""Changes of configfs that wait for a peer or for a device, each made by a small process of its own.

A thread that waits inside the kernel cannot be killed, and keeps its process, with all locks and descriptors, from
ending. An errand inherits none, may outlive us, and ends when the kernel lets it. Nobody has to remember it: what it
has changed, or not yet, is seen in configfs.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence


class Errands:
    """At most one for each `what`, a path."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}

    def run(self, what: str, argv: Sequence[str], patience: float, input: str = "") -> bool:
        """Run a tool of the host, unless one runs for `what`; whether it is over, after `patience` seconds at most.

        Reaps those that have ended.
        """
        for other in list(self._running):
            self.running(other)
        if what in self._running:
            return False
        errand = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            text=True,
            start_new_session=True,
        )
        self._running[what] = errand
        assert errand.stdin
        with contextlib.suppress(BrokenPipeError), errand.stdin as pipe:
            pipe.write(input)
        with contextlib.suppress(subprocess.TimeoutExpired):
            errand.wait(patience)
        return not self.running(what)

    def running(self, what: str) -> bool:
        errand = self._running.get(what)
        if errand and errand.poll() is not None:
            del self._running[what]
            return False
        return errand is not None
