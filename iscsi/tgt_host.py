"""The private tgtd of a service as its target: adopted or started, opened, watched until it dies."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from iscsi.target import TargetUnavailable
from iscsi.tgt import TgtTarget
from iscsi.tgt_daemon import TgtDaemon


class TgtHost:
    """`iscsi.target.TargetHost` by tgtd. `portals` are "HOST:PORT"; `control` is tgtd's number on this host."""

    def __init__(self, run_dir: Path, log_path: Path, control: int, prefix: str, portals: Sequence[str]) -> None:
        self.daemon = TgtDaemon(run_dir, log_path, control)
        # A grow that has to wait lets go of the volume soon: a fence may want it.
        self.target = TgtTarget(self.daemon.ipc, prefix, patience=1.0)
        self._portals = tuple(portals)

    def bring_up(self, rebuild: Callable[[], None]) -> str:
        adopted = self.daemon.adopt()
        if not adopted:
            self.daemon.start()
        rebuild()
        for portal in self._portals:
            self.daemon.open_portal(portal)
        return f"tgtd {self.daemon.pid} {'adopted' if adopted else 'started'}"

    def watch(self, stopping: threading.Event) -> None:
        descriptor = self.daemon.pidfd()
        try:
            while not stopping.is_set():
                if select.select([descriptor], [], [], 0.5)[0]:
                    raise TargetUnavailable("tgtd ended by itself")
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        self.daemon.stop()
