"""qemu-img in the sandbox, on an image of a stranger's: bounded, watched, and its words put into this room's."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from blockdev import qemu_img
from blockdev.command import CommandFailed, Output
from blockdev.extents import Progress
from imagecache.entries import Format
from imagecache.errors import CacheFull, Damaged, SandboxFailed, TooLarge
from imagecache.sandbox import Limits, Process, Sandbox
from imagecache.sandbox import check as check_exit

_IMAGE, _TARGET = PurePosixPath("/image"), PurePosixPath("/target")
#: qemu-img has a thread for each request that waits for the disk.
_QEMU = Limits(memory=2 << 30, cpu=30, processes=128)
_PATIENCE = 300
_SLOWEST, _SLOWEST_CPU = 8 << 20, 32 << 20
"""Bytes a second that qemu-img must get through: by the clock, and of CPU time."""
_TICK = 0.2
"""Seconds between two calls of progress, and so the longest wait for a cancel."""
_MOST_SAID = 64 << 10


def check(sandbox: Sandbox, path: Path) -> qemu_img.Check:
    """`qemu-img check` of a qcow2. Raises Damaged when it cannot even be opened, SandboxFailed."""
    timeout, limits = _bounds(path.stat().st_size, 0)
    with _told():
        return qemu_img.check(partial(sandbox.run, read={str(_IMAGE): path}, limits=limits, timeout=timeout), _IMAGE)


def to_qcow2(
    sandbox: Sandbox, path: Path, format: Format, into: Path, *, size: int, most: int, progress: Progress
) -> None:
    """Write the disk of `size` bytes, a file or (if raw) a block device, into the file `into` as a fresh qcow2 of at
    most `most` bytes. `progress` counts bytes of the disk and cancels by raising. Raises Damaged, TooLarge, CacheFull,
    SandboxFailed."""
    timeout, limits = _bounds(2 * size, most)
    stream = partial(_stream, sandbox, {str(_IMAGE): path}, {str(_TARGET): into}, timeout, limits)
    source = qemu_img.node(_IMAGE, format, device=path.is_block_device())
    with _told():
        for percent in qemu_img.convert_to_qcow2(stream, source, _TARGET):
            progress(int(size * percent / 100), size)


def to_raw(sandbox: Sandbox, path: Path, target: Path, *, size: int, reads_as_zeros: bool, progress: Progress) -> None:
    """Write the qcow2 `path`, a disk of `size` bytes, to `target`, a file or block device that is as large. Zeros are
    written too, unless it `reads_as_zeros` already. `progress` and errors as of to_qcow2."""
    timeout, limits = _bounds(2 * size, size)
    stream = partial(_stream, sandbox, {str(_IMAGE): path}, {str(_TARGET): target}, timeout, limits)
    source = qemu_img.node(_IMAGE, "qcow2")
    with _told():
        for percent in qemu_img.convert_to_raw(stream, source, _TARGET, reads_as_zeros=reads_as_zeros):
            progress(int(size * percent / 100), size)


def _bounds(work: int, file_size: int) -> tuple[float, Limits]:
    """Seconds by the clock and other bounds for so many bytes of work, into a file of at most `file_size`."""
    cpu = _QEMU.cpu + work // _SLOWEST_CPU
    return _PATIENCE + work / _SLOWEST, Limits(_QEMU.memory, cpu, file_size, _QEMU.processes, _QEMU.open_files)


@contextmanager
def _told() -> Iterator[None]:
    """Say in this room's words what qemu-img said."""
    try:
        yield
    except qemu_img.NoRoom as error:
        raise CacheFull(f"the file system is full: {_short(error)}") from error
    except qemu_img.OutgrewLimit as error:
        raise TooLarge("more came out of it than is allowed") from error
    except qemu_img.Unreadable as error:
        raise Damaged(f"qemu-img cannot read it: {_short(error)}") from error


def _short(error: Exception) -> str:
    return "".join(letter for letter in str(error)[:300] if letter.isprintable())


def _stream(
    sandbox: Sandbox,
    read: Mapping[str, Path],
    write: Mapping[str, Path],
    timeout: float,
    limits: Limits,
    argv: Sequence[str],
) -> Iterator[bytes]:
    """Run a tool in the sandbox and give what it says as it comes, and b"" while it is silent; it ends when this is
    closed. Raises CommandFailed, SandboxFailed."""
    popen = partial(sandbox.popen, argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with popen(read=read, write=write, limits=limits) as process:
        complaints = bytearray()
        yield from _said(process, time.monotonic() + timeout, complaints)
        code = process.wait()
    said = Output("", complaints.decode("utf-8", "replace"))
    if code in qemu_img.KILLED_BY_SIZE:
        raise CommandFailed(argv, code, said.stdout, said.stderr)
    check_exit(argv, code, said)


def _said(process: Process, deadline: float, complaints: bytearray) -> Iterator[bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr):
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            if time.monotonic() > deadline:
                raise SandboxFailed("qemu-img was killed: it did not end in time")
            ready = selector.select(_TICK)
            if not ready:
                yield b""
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    yield chunk
                else:
                    complaints += chunk[: _MOST_SAID - len(complaints)]
