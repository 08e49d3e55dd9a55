"""The target's keeper: a private tgtd that is adopted or started, rebuilt, then opened, and watched until it dies.

    adopt a living one, or start one with no portal open → rebuild every export → open the portals → wait for its end

The portals open last: an initiator that reconnects finds its volume or nothing, never an error.
"""

from __future__ import annotations

import os
import select
import threading
import time

import structlog

from app.outside import Outside
from app.reconcile import rebuild
from iscsi.target import TargetError, TargetUnavailable
from iscsi.tgt_daemon import TgtDaemon

log = structlog.get_logger()


class Keeper:
    """`ready` is set while the target serves all it should; `refresh` is called whenever that changes."""

    def __init__(self, daemon: TgtDaemon, outside: Outside, ready: threading.Event, stopping: threading.Event) -> None:
        self._daemon = daemon
        self._outside = outside
        self._ready = ready
        self._stopping = stopping

    def run(self) -> None:
        """Until the worker stops. A target that cannot be had is tried again, ever more slowly."""
        pause = 0.1
        while not self._stopping.is_set():
            try:
                self._bring_up()
                pause = 0.1
                self._wait_for_end()
            except (TargetError, OSError, ValueError) as error:
                log.error("the target is not available", cause=str(error), again_in=pause)
                self._stopping.wait(pause)
                pause = min(pause * 2, 10.0)
            finally:
                self._ready.clear()

    def _bring_up(self) -> None:
        began = time.monotonic()
        adopted = self._daemon.adopt()
        if not adopted:
            self._daemon.start()
        rebuild(self._outside)
        for portal in self._portals():
            self._daemon.open_portal(portal)
        self._ready.set()
        log.info("target is up", pid=self._daemon.pid, adopted=adopted, seconds=round(time.monotonic() - began, 3))

    def _portals(self) -> list[str]:
        settings = self._outside.settings
        direct = settings.attachments.direct_portal
        return [settings.iscsi.portal, *([direct] if direct else [])]

    def _wait_for_end(self) -> None:
        descriptor = self._daemon.pidfd()
        try:
            while not self._stopping.is_set():
                if select.select([descriptor], [], [], 0.5)[0]:
                    raise TargetUnavailable("tgtd ended by itself")
        finally:
            os.close(descriptor)
