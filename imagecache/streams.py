"""One pass over an image: its bytes are hashed as they come, decompressed in the sandbox, hashed again, and written.

    who downloads ──▶ Fanout ──▶ digests of what was sent
                         └────▶ file                             when it is not compressed, else
                         └────▶ [decompressor] ──▶ Fanout ──▶ digests of what is kept
                                                      └────▶ file

Each arrow into a digest, a file or a pipe is a thread: hashlib and the kernel let the others run meanwhile.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from blockdev.transfer import BUFFER
from imagecache import decompress
from imagecache.errors import BadCompression, ImageError, SandboxFailed, TooLarge, Truncated
from imagecache.fanout import Digests, Fanout, Look, SparseFile, joined
from imagecache.sandbox import Limits, Process, Sandbox

STALL = 120.0
"""Seconds in which a decompressor must take or give something while we wait for it."""
CPU = 60
SLOWEST = 8 << 20
"""A decompressor may use CPU seconds, and another for each SLOWEST bytes that it may give."""
SOURCE = Path(decompress.__file__).read_text(encoding="utf-8")
_PACKAGES = "/packages"

T = TypeVar("T")


class Decompressor:
    """A sandboxed process that is fed one stream, and a thread that takes the other to `kept`.

    At most `limit` bytes are taken: TooLarge is raised by `kept` then.
    """

    def __init__(self, sandbox: Sandbox, compression: str, kept: Fanout, limit: int) -> None:
        self._limit = limit
        self._kept = kept
        self.fed = self.given = 0
        self._process = start(sandbox, compression, limit)
        self._stdin, self._stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def feed(self, data: memoryview) -> None:
        """Raises BrokenPipeError when it has ended: `finish` knows why."""
        while data:
            written = os.write(self._stdin.fileno(), data)
            data = data[written:]
            self.fed += written

    def finish(self, look: Look) -> None:
        """No more is fed; wait until all was given. Raises BadCompression, Truncated, TooLarge, SandboxFailed."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        joined(self._thread, look)
        if self._kept.error is not None:
            raise self._kept.error
        said = self._process.stderr.read(1000).decode("utf-8", "replace") if self._process.stderr else ""
        judge(self._process.wait(), said)

    def abort(self) -> None:
        """Whoever waits for it waits no longer."""
        self._process.kill()
        self._thread.join()
        self._process.__exit__(None, None, None)

    def _take(self) -> None:
        try:
            while size := self._fill(self._kept.buffer(lambda: None)):
                self.given += size
                if self.given > self._limit:
                    raise TooLarge(f"more than {self._limit} bytes when decompressed")
                self._kept.push(size)
        except BaseException as error:  # the edge of a thread: `finish` raises it
            self._kept.error = self._kept.error or error
            self._process.kill()

    def _fill(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer) and (got := os.readv(self._stdout.fileno(), [buffer[filled:]])):
            filled += got
        return filled


def start(sandbox: Sandbox, compression: str, limit: int) -> Process:
    """A decompressor that may give `limit` bytes. Of the host it sees its interpreter and two packages."""
    python = Path(sys.executable).resolve()
    packages = {f"{_PACKAGES}/{name}": _package(name) for name in ("isal", "zstandard")}
    prefix = Path(sys.base_prefix).resolve()
    interpreter = {} if prefix.is_relative_to("/usr") else {str(prefix): prefix}
    return sandbox.popen(
        [str(python), "-I", "-S", "-c", SOURCE, compression, _PACKAGES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        read={**interpreter, **packages},
        limits=Limits(cpu=CPU + limit // SLOWEST),
    )


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def judge(returncode: int, said: str) -> None:
    """What the end of a decompressor means. Raises Truncated, BadCompression, SandboxFailed."""
    if returncode == decompress.TRUNCATED:
        raise Truncated("the compressed stream ends before its end")
    if returncode == decompress.BAD:
        raise BadCompression(f"it cannot be decompressed, or something else follows its end: {said}".rstrip(": "))
    if returncode:
        raise SandboxFailed(f"the decompressor went past its bounds, or failed: exit code {returncode}: {said[-300:]}")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    """A pipe that holds a whole buffer, if we may have such a one: fcntl(2), F_SETPIPE_SZ."""
    assert pipe is not None
    with suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, BUFFER)
    return pipe


@dataclass(frozen=True)
class Arrived:
    """Digests by algorithm, and sizes in bytes, of the stream as it was sent and of what was kept of it."""

    stored_digests: Mapping[str, str]
    digests: Mapping[str, str]
    stored_size: int
    size: int


class Pipeline:
    """A sink (blockdev.transfer) for the stream as it is sent; what is kept of it goes to the file `fd`.

    `compression` is what it must be, None: whatever its first bytes say. Neither stream may be longer than `limit`.
    `durable`: the disk has the file at the end. `look` is called while we wait. Use it in a `with`, which ends its
    threads and process.
    """

    def __init__(
        self,
        fd: int,
        sandbox: Sandbox,
        *,
        algorithms: Collection[str],
        compression: str | None,
        limit: int,
        look: Look,
        durable: bool = True,
    ) -> None:
        self._fd = fd
        self._sandbox = sandbox
        self._algorithms = algorithms
        self._compression = compression
        self._limit = limit
        self._look = look
        self._durable = durable
        self._begin()

    def _begin(self) -> None:
        self.position = 0
        self._stored, self._kept = Fanout(), Fanout()
        self._digests, self._kept_digests = Digests(self._algorithms), Digests(self._algorithms)
        self._file = SparseFile(self._fd, durable=self._durable)
        self._decompressor: Decompressor | None = None
        self._moved: tuple[float, tuple[int, int]] = (time.monotonic(), (0, 0))

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes taken so far, and what has become of them."""
        return self.position, self.position if self._decompressor is None else self._decompressor.given

    def buffer(self) -> memoryview:
        return self._explained(lambda: self._stored.buffer(self._watch))

    def push(self, size: int) -> None:
        if self.position == 0:
            self._start(bytes(self.buffer()[: min(size, 16)]))
        self.position += size
        if self.position > self._limit:
            raise TooLarge(f"more than {self._limit} bytes")
        self._stored.push(size)

    def restart(self) -> None:
        self._abort()
        os.ftruncate(self._fd, 0)
        self._begin()

    def finish(self) -> Arrived:
        """Wait for all of it, and for the disk if it is to be durable."""
        if self.position == 0:
            self._start(b"")
        self._explained(lambda: self._stored.finish(self._watch))
        if self._decompressor is not None:
            self._decompressor.finish(self._watch)
            self._kept.finish(self._watch)
        self._file.finish(self._look)
        kept = self._digests if self._decompressor is None else self._kept_digests
        return Arrived(self._digests.hex, kept.hex, self.position, self._file.size)

    def _start(self, head: bytes) -> None:
        found = decompress.recognised(head)
        if self._compression not in (None, found):
            raise BadCompression(f"said to be {self._compression}, but it does not begin so")
        if found is None:
            return self._stored.start(*self._digests.consumers, self._file.write)
        self._kept.start(*self._kept_digests.consumers, self._file.write)
        self._decompressor = Decompressor(self._sandbox, found, self._kept, self._limit)
        self._stored.start(*self._digests.consumers, self._decompressor.feed)

    def _explained(self, act: Callable[[], T]) -> T:
        """A decompressor that takes no more has a reason, which is a better one."""
        try:
            return act()
        except BrokenPipeError:
            assert self._decompressor is not None
            self._decompressor.finish(self._watch)
            raise SandboxFailed("the decompressor ended before its input did") from None

    def _watch(self) -> None:
        self._look()
        if self._decompressor is None:
            return
        now, state = time.monotonic(), (self._decompressor.fed, self._decompressor.given)
        if state != self._moved[1]:
            self._moved = (now, state)
        elif now - self._moved[0] > STALL:
            raise SandboxFailed(f"the decompressor has not moved for {STALL:g} s")

    def _abort(self) -> None:
        """Threads end, in the order in which they wait for one another."""
        for fanout in (self._stored, self._kept):
            fanout.error = fanout.error or ImageError("aborted")
        if self._decompressor is not None:
            self._decompressor.abort()
        self._stored.abort()
        self._kept.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort()
