"""Calls into the kernel that may never return, kept from freezing those who make them.

A thread that waits inside configfs for a sick device cannot be killed and knows no time limit. So each call is made on
a thread of its own, and its caller leaves when the deadline has passed. Until that thread is back the target is
*degraded*: further calls fail at once, for they could wait for the same lock of the kernel. A call that was given up
stops at its next step: it does nothing late that nobody expects any more.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from blockdev.locks import FileLock, LockTimeout
from iscsi.target import TargetUnavailable

_T = TypeVar("_T")


@dataclass(frozen=True)
class Degraded:
    """Which call has not come back from the kernel, and when it was made (UTC)."""

    call: str
    since: dt.datetime

    def __str__(self) -> str:
        return f"the kernel has not answered {self.call!r} of {self.since:%Y-%m-%d %H:%M:%S} UTC"


class GivenUp(Exception):
    """Raised inside a call whose caller has left."""


class _Call(Generic[_T]):
    def __init__(self, name: str, work: Callable[[], _T], release: Callable[[], None]) -> None:
        self.state = Degraded(name, dt.datetime.now(dt.UTC))
        self.given_up = False
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.result: _T
        self._work, self._release = work, release

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # the edge of a thread; the caller gets it
            self.error = error
        finally:
            self._release()
            self.done.set()


class Guard:
    """Runs calls under a deadline of `deadline` seconds, those that change anything one at a time under `lock`."""

    def __init__(self, lock: Path, deadline: float) -> None:
        self._lock, self._deadline = lock, deadline
        self._stuck: list[_Call[Any]] = []
        self._current = threading.local()

    @property
    def degraded(self) -> Degraded | None:
        """The oldest call that was given up and is not back; None when all is well."""
        self._stuck = [call for call in self._stuck if not call.done.is_set()]
        return self._stuck[0].state if self._stuck else None

    def look(self, name: str, work: Callable[[], _T]) -> _T:
        """Raises TargetUnavailable, and what `work` raises."""
        self._require_health()
        return self._made(_Call(name, work, lambda: None))

    def change(self, name: str, work: Callable[[], _T]) -> _T:
        """Like `look`, as the only one who writes. A call that was given up keeps the lock until it is back."""
        self._require_health()
        lock = FileLock(self._lock, self._deadline)
        try:
            lock.acquire()
        except LockTimeout as error:
            raise TargetUnavailable(f"{name}: another hand is at work on the target: {error}") from error
        return self._made(_Call(name, work, lock.release))

    def step(self) -> None:
        """To be called between the steps of a call. Raises GivenUp."""
        if self._current.call.given_up:
            raise GivenUp

    def _require_health(self) -> None:
        if stuck := self.degraded:
            raise TargetUnavailable(str(stuck))

    def _made(self, call: _Call[_T]) -> _T:
        def run() -> None:
            self._current.call = call
            call.run()

        threading.Thread(target=run, name=f"lio {call.state.call}", daemon=True).start()
        if not call.done.wait(self._deadline):
            call.given_up = True
            self._stuck = [*self._stuck, call]
            raise TargetUnavailable(str(call.state))
        if call.error:
            raise call.error
        return call.result
