"""A guest that writes: a real initiator, one write of 4 KiB at a time, and how long the longest took."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from types import TracebackType
from typing import Any, Self

BLOCK = 4096


class Guest:
    """qemu-io logged in to an attachment's connection, writing random blocks of its first `span` bytes.

    `longest` and `count` tell of the writes that ended since the last `reset`.
    """

    def __init__(self, attachment: dict[str, Any], span: int) -> None:
        self._process = _qemu_io(attachment)
        self._blocks = span // BLOCK
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._error: str | None = None
        self.reset()

    def reset(self) -> None:
        self.longest = 0.0
        self.count = 0

    def wait_for_one(self, timeout: float = 60) -> None:
        """Until a write that is in flight now has ended."""
        goal, deadline = self.count + 1, time.monotonic() + timeout
        while self.count < goal and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for_one()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._process.communicate("quit\n", timeout=20)
        if kind is None and (self._error or not self.count):
            raise RuntimeError(f"the guest could not write: {self._error}")

    def _write(self) -> None:
        order = random.Random(1)
        while not self._stop.is_set() and not self._error:
            began = time.perf_counter()
            self._error = self._write_block(order.randrange(self._blocks) * BLOCK)
            self.longest = max(self.longest, (time.perf_counter() - began) * 1000)
            self.count += 1

    def _write_block(self, offset: int) -> str | None:
        """Write and wait for the answer: what qemu-io complains of, or None."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"write -P 7 {offset} {BLOCK}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if f"wrote {BLOCK}/{BLOCK}" not in line:
            return line.strip() or "it ended"
        self._process.stdout.readline()  # its own account of the time
        return None


def _qemu_io(attachment: dict[str, Any]) -> subprocess.Popen[str]:
    """The secret goes through a file of memory, never through an argv."""
    connection = attachment["connection"]
    descriptor = os.memfd_create("secret")
    os.write(descriptor, connection["auth"]["password"].encode())
    options = f"driver=iscsi,transport=tcp,portal={connection['portal']},target={connection['target']}"
    options += f",lun={connection['lun']},initiator-name={attachment['initiator']}"
    options += f",user={connection['auth']['username']},password-secret=chap"
    secret = f"secret,id=chap,file=/proc/self/fd/{descriptor}"
    argv = ["stdbuf", "-i0", "-oL", "qemu-io", "--object", secret, "--image-opts", options]
    try:
        return subprocess.Popen(
            argv,
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        os.close(descriptor)
