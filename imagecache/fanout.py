"""One stream to several who take it, each in a thread: hashlib and the kernel let the others run meanwhile."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from blockdev.transfer import BUFFER, TICK

DEPTH = 8
"""Buffers under way at most, in each Fanout."""
_BLOCK = 64 << 10
_WRITE_OUT = 8 << 20
_ZEROS = bytes(_BLOCK)

Look = Callable[[], object]
"""Called every TICK seconds while something is waited for; what it raises ends the waiting."""
Consumer = Callable[[memoryview], object]


@dataclass
class _Filled:
    whole: memoryview
    size: int
    left: int


class Fanout:
    """Gives each buffer to all consumers, each in a thread of its own, in order.

    Nobody is more than DEPTH buffers ahead of the slowest. What a consumer raises comes to who asks for the next
    buffer, or finishes; after it no consumer is called any more.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(DEPTH):
            self._free.put(memoryview(bytearray(BUFFER)))
        self._current: memoryview | None = None
        self._inboxes: list[queue.SimpleQueue[_Filled | None]] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, *consumers: Consumer) -> None:
        """Once, before the first push."""
        for consumer in consumers:
            inbox: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
            thread = threading.Thread(target=self._work, args=(consumer, inbox), daemon=True)
            self._inboxes.append(inbox)
            self._threads.append(thread)
            thread.start()

    def buffer(self, look: Look) -> memoryview:
        """One to be filled and pushed; the same one until then."""
        while self._current is None:
            try:
                self._current = self._free.get(timeout=TICK)
            except queue.Empty:
                look()
        if self.error is not None:
            raise self.error
        return self._current

    def push(self, size: int) -> None:
        assert self._current is not None
        filled = _Filled(self._current, size, len(self._inboxes))
        self._current = None
        for inbox in self._inboxes:
            inbox.put(filled)

    def finish(self, look: Look) -> None:
        """Wait until all consumers have had everything."""
        self.stop()
        for thread in self._threads:
            joined(thread, look)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """No more comes. Threads end by themselves when they have had what is there."""
        for inbox in self._inboxes:
            inbox.put(None)

    def abort(self) -> None:
        """Consumers are not called any more, and none is at work when this returns: none may wait for anybody."""
        self.error = self.error or RuntimeError("aborted")
        self.stop()
        for thread in self._threads:
            thread.join()

    def _work(self, consumer: Consumer, inbox: queue.SimpleQueue[_Filled | None]) -> None:
        while (filled := inbox.get()) is not None:
            try:
                if self.error is None:
                    consumer(filled.whole[: filled.size])
            except BaseException as error:  # the edge of a thread: it is raised where somebody listens
                self.error = self.error or error
            self._release(filled)

    def _release(self, filled: _Filled) -> None:
        with self._lock:
            filled.left -= 1
            if filled.left == 0:
                self._free.put(filled.whole)


def joined(thread: threading.Thread, look: Look) -> None:
    while thread.is_alive():
        thread.join(TICK)
        look()


class Digests:
    """Of one stream, by several algorithms."""

    def __init__(self, algorithms: Collection[str]) -> None:
        self._hashes = {name: hashlib.new(name) for name in algorithms}

    @property
    def consumers(self) -> list[Consumer]:
        return [each.update for each in self._hashes.values()]

    @property
    def hex(self) -> dict[str, str]:
        return {name: each.hexdigest() for name, each in self._hashes.items()}


class SparseFile:
    """Writes a new file from its start; blocks of zeros stay holes. One that is to be `durable` is written to the disk
    all the while, so that little is left to wait for at its end."""

    def __init__(self, fd: int, *, durable: bool) -> None:
        self._fd = fd
        self._durable = durable
        self._written_out = 0
        self.size = 0

    def write(self, data: memoryview) -> None:
        start = None
        for at in range(0, len(data), _BLOCK):
            if _is_zero(data[at : at + _BLOCK]):
                if start is not None:
                    self._put(data[start:at], self.size + start)
                start = None
            elif start is None:
                start = at
        if start is not None:
            self._put(data[start:], self.size + start)
        self.size += len(data)
        if self._durable and self.size - self._written_out >= _WRITE_OUT:
            self._write_out()

    def _write_out(self) -> None:
        """The kernel begins to write these pages (mm/fadvise.c). They stay in memory: they are not clean yet."""
        start, self._written_out = self._written_out, self.size
        os.posix_fadvise(self._fd, start, self.size - start, os.POSIX_FADV_DONTNEED)

    def finish(self, look: Look) -> None:
        """It has its size; if it is to be durable, the disk has it."""
        os.ftruncate(self._fd, self.size)
        if not self._durable:
            return
        with ThreadPoolExecutor(1) as pool:
            synced = pool.submit(os.fsync, self._fd)
            while wait([synced], TICK).not_done:
                look()
        synced.result()

    def _put(self, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written


def _is_zero(block: memoryview) -> bool:
    return block[0] == 0 and block[-1] == 0 and bytes(block) == _ZEROS[: len(block)]
