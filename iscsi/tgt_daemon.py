"""One private tgtd process: started, adopted, stopped.

    RUN_DIR/tgtd.sock.N        management socket (N: the control number), mode by the directory
    RUN_DIR/tgtd.sock.N.lock   locked by tgtd as long as it lives

The lock is our pid file: the kernel names its holder, frees it only when the last of its threads can do no more I/O,
and it is never stale. No portal is open after a start, so nothing can be reached before the exports are rebuilt; the
real portal is opened last. tgtd has a session of its own and outlives its supervisor, whose successor adopts it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import struct
import subprocess
import time
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from iscsi import tgt_show
from iscsi.limits import THREADS_PER_LUN
from iscsi.target import TargetError, TargetUnavailable
from iscsi.tgt_ipc import TgtIpc

_SOCKET = "tgtd.sock"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
_PAUSE = 0.005


class TgtDaemon:
    """The tgtd whose socket lies in `run_dir` under the number `control`; others on the host do not matter.

    `run_dir` must exist; whoever may enter it may ask tgtd for anything, so it is 0700. tgtd's messages are appended to
    `log_path`. `environment` is added to what tgtd inherits.
    """

    def __init__(
        self, run_dir: Path, log_path: Path, control: int, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._run_dir, self._log_path, self._control = run_dir, log_path, control
        self._environment = dict(environment or {})
        self._child: subprocess.Popen[bytes] | None = None
        self.ipc = TgtIpc(run_dir, f"{_SOCKET}.{control}")

    @property
    def pid(self) -> int | None:
        """The process that serves the socket, or None."""
        self._reap()
        lock = self._run_dir / f"{_SOCKET}.{self._control}.lock"
        try:
            with lock.open("rb") as file:
                answer = fcntl.fcntl(file, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        except FileNotFoundError:
            return None
        kind, _, _, _, pid = _FLOCK.unpack(answer)
        return None if kind == fcntl.F_UNLCK else pid

    def alive(self) -> bool:
        return self.pid is not None

    def pidfd(self) -> int:
        """A descriptor that becomes readable when tgtd dies; the caller closes it. Raises TargetUnavailable."""
        pid = self.pid
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                descriptor = os.pidfd_open(pid)
                if self.pid == pid:  # still the same process, not a later one with its number
                    return descriptor
                os.close(descriptor)
        raise TargetUnavailable(f"no tgtd runs in {self._run_dir}")

    def adopt(self) -> bool:
        """Whether a tgtd that somebody else started, and that answers, serves our socket: then it is ours now."""
        return self.alive() and self.ipc.answers()

    def start(self, timeout: float = 10.0) -> None:
        """Start tgtd and wait until it answers. One that holds the socket and does not answer is killed first.

        Raises TargetError when one is there that answers (adopt it), TargetUnavailable when it does not come up.
        """
        if self.adopt():
            raise TargetError(f"tgtd {self.pid} serves {self._run_dir} already")
        self.kill()
        with self._log_path.open("ab") as log:
            self._child = subprocess.Popen(
                ["tgtd", "-f", "-C", str(self._control), "-t", str(THREADS_PER_LUN), "--iscsi", "portal=127.0.0.1:0"],
                cwd=self._run_dir,
                env={**os.environ, **self._environment, "TGT_IPC_SOCKET": _SOCKET},  # relative: 108 bytes are few
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_ready(time.monotonic() + timeout)
        _raise_descriptors(self._child.pid)
        for portal in self.portals():  # tgtd insists on one at its start
            self.ipc.close_portal(portal)

    def portals(self) -> list[str]:
        """HOST:PORT of each open portal, in tgtd's spelling (IPv6 hosts in brackets)."""
        return tgt_show.portals(self.ipc.show_portals())

    def open_portal(self, portal: str) -> str:
        """Listen at "HOST:PORT" (a numeric host, IPv6 in brackets) and return it; port 0 is replaced by the one chosen.

        Open already is success. Raises ValueError for a bad portal, TargetRefused when the address cannot be had.
        """
        portal = _normal(portal)
        before = self.portals()
        if portal not in before:
            self.ipc.open_portal(portal)
        return next((new for new in self.portals() if new not in before), portal)

    def stop(self, timeout: float = 10.0) -> None:
        """End tgtd in order: portals, sessions, targets, process. What does not end within `timeout` seconds is killed.

        Whatever was acknowledged to initiators is in the page cache and survives either way. Not running is success.
        """
        deadline = time.monotonic() + timeout
        with contextlib.suppress(TargetError):
            self._take_down(deadline)
            if self._wait_gone(deadline):
                return
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait until it can do no more I/O. Not running is success."""
        with contextlib.suppress(TargetUnavailable):
            descriptor = self.pidfd()
            try:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                select.select([descriptor], [], [], 10)
            finally:
                os.close(descriptor)
        if not self._wait_gone(time.monotonic() + 10):
            raise TargetError(f"tgtd {self.pid} does not die")

    def _take_down(self, deadline: float) -> None:
        for portal in self.portals():
            self.ipc.close_portal(portal)
        while targets := tgt_show.target_names(self.ipc.list_targets()):
            for tid, _ in targets:
                self._take_down_target(tid)
            if time.monotonic() > deadline:
                raise TargetError("sessions do not end")
            time.sleep(_PAUSE)
        self.ipc.shut_down()

    def _take_down_target(self, tid: int) -> None:
        for session_id, connection_id, _, _ in tgt_show.connections(self.ipc.show_connections(tid)):
            self.ipc.close_connection(tid, session_id, connection_id)
        with contextlib.suppress(TargetError):  # refused while sessions are listed: the next round deletes it
            self.ipc.delete_target(tid)

    def _wait_ready(self, deadline: float) -> None:
        while not (self.alive() and self.ipc.answers()):
            if self._reap() is not None or time.monotonic() > deadline:
                tail = self._log_path.read_bytes()[-500:].decode(errors="replace").strip()
                raise TargetUnavailable(f"tgtd did not start in {self._run_dir}: {tail}")
            time.sleep(_PAUSE)

    def _wait_gone(self, deadline: float) -> bool:
        """tgtd leaves its loop at the next event after the shut-down: asking again is one."""
        while self.alive():
            if time.monotonic() > deadline:
                return False
            self.ipc.answers()
            time.sleep(_PAUSE)
        if self._child:
            self._child.wait()
        return True

    def _reap(self) -> int | None:
        """The exit status of a tgtd that was our child and has ended."""
        return self._child.poll() if self._child else None


def _raise_descriptors(pid: int) -> None:
    """Let tgtd open as many files as its hard limit allows: one for each LUN and session."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


def _normal(portal: str) -> str:
    host, _, port = portal.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"portal {portal!r}: expected HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        return f"[{IPv6Address(host[1:-1])}]:{int(port)}"
    return f"{IPv4Address(host)}:{int(port)}"
