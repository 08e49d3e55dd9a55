"""The target's keeper: it is brought up, rebuilt, then opened, and watched until it fails.

    adopt a living one, or start one with no portal open → rebuild every export → open the portals → wait for its end

The portals open last: an initiator that reconnects finds its volume or nothing, never an error.
"""

from __future__ import annotations

import threading
import time

import structlog

from app.outside import Outside
from app.reconcile import rebuild
from iscsi.target import TargetError, TargetHost

log = structlog.get_logger()


class Keeper:
    """`ready` is set while the target serves all it should."""

    def __init__(self, host: TargetHost, outside: Outside, ready: threading.Event, stopping: threading.Event) -> None:
        self._host = host
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
                self._host.watch(self._stopping)
            except (TargetError, OSError, ValueError) as error:
                log.error("the target is not available", cause=str(error), again_in=pause)
                self._stopping.wait(pause)
                pause = min(pause * 2, 10.0)
            finally:
                self._ready.clear()

    def _bring_up(self) -> None:
        began = time.monotonic()
        how = self._host.bring_up(lambda: rebuild(self._outside))
        self._ready.set()
        log.info("target is up", how=how, seconds=round(time.monotonic() - began, 3))
