"""Locks between processes, which a dead process cannot keep and its living child does."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05


class LockTimeout(Exception):
    """Somebody else held the lock all the time we were willing to wait."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__(f"{path}: still locked after {timeout:g} s")
        self.path = path
        self.timeout = timeout


def try_flock(fd: int) -> bool:
    """Take flock(2) LOCK_EX on `fd` if nobody holds it; whether we have it now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


#: Where locks are that exclude every other service of the host, 0700: not in /run/lock, where everybody may write.
HOST_LOCKS = Path("/run/stratus")


class FileLock:
    """An exclusive lock on the file `path`, created if missing: `with FileLock(path): ...`.

    flock(2) belongs to the open file, not to the process: two FileLocks exclude each other in two threads as in two
    processes, and a child that got `fd` (`run(..., pass_fds=[lock.fd])`) goes on holding the lock when we die. So
    releasing is closing, never LOCK_UN: that would take the lock from such a child too.

    The file is never unlinked. A waiter has the old file open; once it is unlinked a newcomer creates and locks a
    second file of the same name, and both believe that they are alone.

    Not re-entrant, and one object serves one thread at a time.
    """

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        self.path = path
        self.timeout = timeout
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        """The descriptor that holds the lock. Raises ValueError when we do not hold it."""
        if self._fd is None:
            raise ValueError(f"{self.path}: the lock is not held")
        return self._fd

    def acquire(self) -> None:
        """Wait for the lock, for ever if `timeout` is None. Raises LockTimeout."""
        fd = self._open()
        try:
            if self.timeout is None:
                fcntl.flock(fd, fcntl.LOCK_EX)
            else:
                self._wait(fd, self.timeout)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def try_lock(self) -> bool:
        """Take the lock if it is free; whether we have it now."""
        fd = self._open()
        if not try_flock(fd):
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Let go. A child that inherited `fd` keeps the lock until it ends."""
        os.close(self.fd)
        self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def _open(self) -> int:
        if self._fd is not None:
            raise ValueError(f"{self.path}: the lock is already held")
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def _wait(self, fd: int, timeout: float) -> None:
        """Ask, ever less often: flock(2) knows no time limit, and a signal to end it belongs to the main thread."""
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while not try_flock(fd):
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockTimeout(self.path, timeout)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
