"""The kernel's LIO as a service's target: nothing to start, so it is looked at, rebuilt, opened and watched."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import UUID

from blockdev.locks import HOST_LOCKS, FileLock
from iscsi import lio_configfs as configfs
from iscsi.lio import LioTarget
from iscsi.lio_layers import load
from iscsi.target import TargetBusy, TargetError, TargetUnavailable

_PAUSE = 0.05


class LioHost:
    """`iscsi.target.TargetHost` by LIO. `portals` are "HOST:PORT", IPv6 hosts in brackets.

    A kernel has one LIO: whoever writes to it, of whatever service, does so under locks of the host.

    Two services on a host need different prefixes: each takes everything under its own for its own. `owner` names this
    one for good. The lock of a prefix says whose it is, for as long as there are exports under it: also while its owner
    is between two lives. A reboot clears both.
    """

    def __init__(self, prefix: str, portals: Sequence[str], owner: str, *, locks: Path = HOST_LOCKS) -> None:
        self.target = LioTarget(prefix, [_split(portal) for portal in portals], locks / "stratus-lio.lock")
        locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock, self._prefix = FileLock(locks / f"stratus-lio.{prefix}.lock"), prefix
        self._owner, self._owned = owner, False

    def bring_up(self, rebuild: Callable[[], None]) -> str:
        if not self._own():
            raise TargetError(
                f"another service on this host exports under {self._prefix} ({self._named()}): set another iqn_prefix"
            )
        rebuild()
        self.target.open_portals()
        return "LIO"

    def watch(self, stopping: threading.Event) -> None:
        while not stopping.wait(0.5):
            if stuck := self.target.degraded:
                raise TargetUnavailable(str(stuck))

    def _own(self) -> bool:
        """Whether the prefix is ours, from the first time on and for as long as this process lives."""
        if self._owned:
            return True
        if not self._lock.try_lock():
            return False
        if self._named() != self._owner and self.target.inventory():
            self._lock.release()
            return False
        self._lock.path.write_text(self._owner)
        self._owned = True
        return True

    def _named(self) -> str:
        return self._lock.path.read_text()

    def stop(self, timeout: float = 10.0) -> None:
        """Raises TargetBusy for a session whose write in flight takes longer than `timeout` seconds; the rest is ended.

        What another service has under the prefix stays: it is that one's to end.
        """
        if not self._own():
            return
        deadline = time.monotonic() + timeout
        left = [state.volume_id for state in self.target.inventory()]
        while left := [volume_id for volume_id in left if not self._ended(volume_id)]:
            if time.monotonic() > deadline:
                raise TargetBusy(left[0], self.target.drain(left[0]))
            time.sleep(_PAUSE)

    def _ended(self, volume_id: UUID) -> bool:
        if self.target.drain(volume_id):
            return False
        try:
            self.target.remove(volume_id)
        except TargetBusy:  # a login that came just before the fence
            return False
        return True


def examine() -> str:
    """What LIO is here, loaded if it was not. Raises TargetUnavailable."""
    if os.geteuid():
        raise TargetUnavailable("LIO needs root; tgt does not")
    load()
    version = Path(configfs.FABRIC, "lio_version").read_text().strip()
    return f"{version}; {len(list(configfs.target_names()))} targets"


def _split(portal: str) -> tuple[str, int]:
    host, _, port = portal.rpartition(":")
    return host.strip("[]"), int(port)
