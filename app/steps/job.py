"""One claimed operation while it is worked on: its lock, its progress, its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from uuid import UUID

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from app.library import Library
from app.models import Attachment, Image, Operation, Snapshot, Volume
from app.operations import Cancelled, Lost, guarded
from app.outside import Outside
from blockdev.extents import Progress
from blockdev.locks import FileLock
from imagecache.errors import CacheUnusable
from pools import Pool, PoolUnusable

Settle = Callable[[Session], None]
Row = TypeVar("Row", Volume, Snapshot, Attachment, Image)


_STANDING = select(Operation.fence, Operation.state, Operation.cancel_requested).where(
    Operation.id == bindparam("my_id")
)


class Again(Exception):
    """Not now: try the operation again in `delay` seconds, and tell the client why."""

    def __init__(self, delay: float, message: str) -> None:
        super().__init__(message)
        self.delay = delay
        self.message = message


class Vanished(Exception):
    """The resource was dealt with by somebody else: there is nothing left to do."""


class Elsewhere(Vanished):
    """The resource is there, in a state that is not this operation's."""

    def __init__(self, state: str) -> None:
        super().__init__(f"it is {state} by now: what was asked for before has failed or is no longer wanted")


class Refusal(Exception):
    """It cannot be done, for a reason with a `code` of its own that is nobody's defect."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NeedsDetach(Exception):
    """The pool can no longer copy in one instant (it was activated anew), and the volume is being written."""


class CloneNeedsDetach(NeedsDetach):
    pass


class SnapshotNeedsDetach(NeedsDetach):
    pass


class Job:
    #: How often progress is written, seconds: a client sees it move, the database hardly notices.
    REPORT = 0.5

    def __init__(self, operation: Operation, outside: Outside, stopping: threading.Event) -> None:
        self.operation = operation
        self.outside = outside
        self._stopping = stopping
        self._reported = time.monotonic()

    @contextmanager
    def lock(self, lane: str | None = None, *, cancellable: bool = True) -> Iterator[None]:
        """Alone with the volume from here on; raises Lost if the operation is somebody else's by now."""
        with self.outside.lock(self.operation.subject_id, lane or self.operation.lane):
            self._still_mine(cancellable)
            yield

    @contextmanager
    def elsewhere(self, lock: FileLock, delay: float, message: str) -> Iterator[None]:
        """Alone with what `lock` stands for, or later: who would have to wait gives its thread away."""
        if not lock.try_lock():
            raise Again(delay, message)
        try:
            yield
        finally:
            lock.release()

    def _still_mine(self, cancellable: bool) -> None:
        with self.outside.database.read() as session:
            row = session.execute(_STANDING, {"my_id": self.operation.id}).first()
        if row is None or row.fence != self.operation.fence or row.state != "running":
            raise Lost(str(self.operation.id))
        if row.cancel_requested and cancellable:
            raise Cancelled

    def load(self, model: type[Row], identifier: UUID | None = None, *, state: str | None = None) -> Row:
        """The row the operation works on; raises Vanished when it is gone, Elsewhere when it is not in `state`."""
        with self.outside.database.read() as session:
            row = session.get(model, identifier or self.operation.resource_id)
        if row is None or row.state == "detached":
            raise Vanished
        if state is not None and row.state != state:
            raise Elsewhere(row.state)
        return row

    def pool(self, name: str) -> Pool:
        """The active pool; raises PoolUnusable otherwise."""
        pool = self.outside.pools.get(name)
        if pool is None:
            raise PoolUnusable(name, "it is not active")
        return pool

    def copyable(self, volume_id: UUID, refusal: type[NeedsDetach]) -> None:
        """Look again that the volume can be copied as it was promised; raises `refusal` otherwise."""
        source = self.load(Volume, volume_id)
        if source.held_mode == "rw" and not self.pool(source.pool).live_clone:
            raise refusal(
                f"volume {volume_id} is attached for writing, and its pool copies byte by byte: detach it first"
            )

    def library(self) -> Library:
        """What turns references into images; raises CacheUnusable when the cache is not active."""
        if self.outside.library is None:
            raise CacheUnusable("the cache of images is not active")
        return self.outside.library

    def progress(self, done: int, total: int) -> None:
        """To be called often by long work: tells the client, and ends the work if that is asked for."""
        self._go_on(done, total, cancellable=True)

    def meter(self, *doing: str) -> Progress:
        """`progress` that also tells how fast it goes and how long it will take. With two things to do, one after the
        other, the bytes are counted twice, and total is that of both."""
        began = time.monotonic()

        def go_on(done: int, total: int) -> None:
            each = total // len(doing)
            step = min(done // each, len(doing) - 1) if each else 0
            told = lambda: pace(doing[step], done - step * each, each, began)  # noqa: E731
            self._go_on(done, total, cancellable=True, message=told)

        return go_on

    def check(self) -> None:
        """To be called often by whoever waits: ends the waiting if that is asked for."""
        self._go_on(0, 0, cancellable=True)

    def report(self, done: int, total: int) -> None:
        """`progress` of work that can no longer be cancelled."""
        self._go_on(done, total, cancellable=False)

    def _go_on(
        self, done: int, total: int, *, cancellable: bool, message: Callable[[], str | None] = lambda: None
    ) -> None:
        if self._stopping.is_set():
            raise Again(0, "the service is restarting")
        if time.monotonic() - self._reported < self.REPORT:
            return
        self._reported = time.monotonic()
        percent = min(99, done * 100 // max(total, 1))
        with self.outside.database.write(durable=False) as session:
            guarded(session, self.operation, progress=percent, message=message())
        self._still_mine(cancellable)


def pace(doing: str, done: int, total: int, began: float) -> str:
    """For people: how much of how much, how fast, and how long yet. `total` is 0 when nobody knows."""
    rate = done / max(time.monotonic() - began, 0.001)
    of_all = f" of {total >> 20}" if total else ""
    left = f", {(total - done) / rate:.0f} s left" if total and rate > 1 else ""
    return f"{doing}: {done >> 20}{of_all} MiB, {rate / (1 << 20):.0f} MiB/s{left}"
