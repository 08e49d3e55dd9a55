"""Bytes from afar that may break off: asked for again from where they ended, and never a mix of two contents.

    size = download(opener, sink, progress=…)

An opener asks for the bytes; it knows HTTP, or whatever it is. A sink takes them; it hashes and keeps. Between the two
lies only what both need: which byte comes next, and how often to try.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from blockdev.extents import Progress

BUFFER = 1 << 20
"""Bytes given to a sink at once: enough that hashing one lets other threads run meanwhile."""
LEAST_GAIN = 1 << 20
"""An attempt that brings fewer bytes nobody has brought before counts as failed."""
TICK = 0.2
"""Seconds between two calls of `progress`, at most."""
LONGEST_PAUSE = 30.0


class Interrupted(Exception):
    """The bytes broke off, or did not begin to come; asking again may help."""


@dataclass(frozen=True)
class Part:
    """The bytes of a content from `offset` to its end; `readinto` puts some into a buffer, 0 at the end.

    `size` is that of the whole content in bytes, None if nobody knows. `validator` names this content and no other
    (None: nothing does, and what breaks off begins anew).
    """

    readinto: Callable[[memoryview], int]
    offset: int
    size: int | None
    validator: str | None


#: (offset, validator) → the bytes from there if the content is still the validator's, or all of what it is now, as
#: `Part.offset` says. With validator None, all. Opening and reading raise Interrupted where asking again may help.
Opener = Callable[[int, str | None], AbstractContextManager[Part]]


class Sink(Protocol):
    """Takes a content from its first byte to its last."""

    @property
    def position(self) -> int:
        """Bytes taken."""

    def buffer(self) -> memoryview:
        """At least one byte, to be filled from its start and pushed; the same one until then."""

    def push(self, size: int) -> None:
        """Take the first `size` bytes of the buffer."""

    def restart(self) -> None:
        """Forget all that was taken: what comes next is the first byte of another content."""


def download(
    opener: Opener,
    sink: Sink,
    *,
    validator: str | None = None,
    progress: Progress,
    attempts: int = 5,
    backoff: float = 1.0,
) -> int:
    """Bring a whole content into `sink`, and return its size in bytes.

    A sink that has some bytes already (of the content that `validator` names) gets the rest. `progress(done, total)`
    (total 0: not known) is called about every TICK seconds, while we pause too; what it raises ends the transfer.

    After `attempts` in a row that brought nothing new, the last one's Interrupted is raised; between them we wait
    `backoff` seconds, then twice that, and so on. What opener or sink raise else is passed on at once.
    """
    return _Download(sink, progress, validator).run(opener, attempts, backoff)


class _Download:
    """`filled` bytes of the sink's buffer wait to be pushed. They stay over an interruption, so that a sink gets full
    buffers until the end, wherever the connections ended."""

    def __init__(self, sink: Sink, progress: Progress, validator: str | None) -> None:
        self._sink = sink
        self._progress = progress
        self._validator = validator
        self._buffer = sink.buffer()
        self._filled = 0
        self._size: int | None = None
        self._told = 0.0

    @property
    def position(self) -> int:
        return self._sink.position + self._filled

    def run(self, opener: Opener, attempts: int, backoff: float) -> int:
        furthest, failures = self.position, 0
        while True:
            try:
                self._attempt(opener)
                return self.position
            except Interrupted:
                failures = 0 if self.position >= furthest + LEAST_GAIN else failures + 1
                furthest = max(furthest, self.position)
                if failures >= attempts:
                    raise
            self._pause(backoff * 2.0**failures)

    def _attempt(self, opener: Opener) -> None:
        asked = self.position if self._validator is not None else 0
        with opener(asked, self._validator) as part:
            if part.offset != self.position:
                self._restart(part.offset)
            elif part.offset and part.size != self._size is not None:
                self._validator = None
                raise Interrupted(f"of {self._size} bytes before, and of {part.size} now, by the same name")
            self._validator, self._size = part.validator, part.size
            self._tell()
            while part.size is None or self.position < part.size:
                if not self._take(part):
                    break
        self._push()

    def _take(self, part: Part) -> bool:
        """Some more bytes, no more than the content has; whether there were any. Raises Interrupted."""
        room = self._buffer[self._filled :]
        got = part.readinto(room if part.size is None else room[: part.size - self.position])
        if not got and part.size is not None:
            raise Interrupted(f"ended after {self.position} of {part.size} bytes")
        self._filled += got
        if self._filled == len(self._buffer):
            self._push()
        self._tell()
        return got > 0

    def _push(self) -> None:
        if self._filled:
            self._sink.push(self._filled)
            self._filled = 0
            self._buffer = self._sink.buffer()

    def _restart(self, offset: int) -> None:
        if offset:
            raise ValueError(f"the opener gave the bytes from {offset}, neither those asked for nor all")
        self._filled = 0
        self._sink.restart()
        self._buffer = self._sink.buffer()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= TICK:
            self._told = now
            self._progress(self.position, self._size or 0)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + min(seconds, LONGEST_PAUSE)
        while (left := until - time.monotonic()) > 0:
            self._tell()
            time.sleep(min(TICK, left))
        self._tell()


class HashedFile:
    """A sink: a file, and the digest of what is in it. What the file has when it is opened counts as taken.

    `with HashedFile(path) as sink:`; the bytes are durable once `sync` returned, the name is its directory's.
    """

    def __init__(self, path: Path, algorithm: str = "sha256") -> None:
        self._algorithm = algorithm
        self._buffer = memoryview(bytearray(BUFFER))
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.position = 0
        self._hash = hashlib.new(algorithm)
        while got := os.preadv(self._fd, [self._buffer], self.position):
            self._count(got)

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def buffer(self) -> memoryview:
        return self._buffer

    def push(self, size: int) -> None:
        written = 0
        while written < size:
            written += os.pwrite(self._fd, self._buffer[written:size], self.position + written)
        self._count(size)

    def restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self.position = 0
        self._hash = hashlib.new(self._algorithm)

    def sync(self) -> None:
        os.fsync(self._fd)

    def _count(self, size: int) -> None:
        self._hash.update(self._buffer[:size])
        self.position += size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
