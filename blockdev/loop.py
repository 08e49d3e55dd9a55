"""Loop devices over regular files, or read-only ones over block devices: direct I/O, gone with their last user.

Every device is made with LO_FLAGS_AUTOCLEAR (loop(4)): the kernel detaches it when the last opener closes it. So a
hand that dies before somebody else has opened the device leaves nothing behind, and nobody has to look for stale ones.

Direct I/O saves the second page cache. The kernel falls back to buffered I/O without a word where the file system knows
no O_DIRECT (tmpfs) or where its blocks are larger than the device's sectors of 512 bytes, which stay 512 so that a
volume looks the same wherever it lies; a flush is an fsync of the file either way.

A read-only one refuses whatever would change a byte, discards included, in its own driver (loop_handle_cmd in Linux'
drivers/block/loop.c). The kernel does that for no block device as such: a bio that writes to one that is marked
read-only passes with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# linux/loop.h
_SET_CAPACITY, _GET_STATUS64, _CONFIGURE, _CTL_GET_FREE = 0x4C07, 0x4C05, 0x4C0A, 0x4C82
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_INFO = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64x")  # struct loop_config

_CONTROL = Path("/dev/loop-control")
_SECTOR = 512


class Status(NamedTuple):
    """What a loop device is made of. `device` and `inode` are st_dev and st_ino of the file behind it, `block` its
    st_rdev: the block device's number, if it is one."""

    device: int
    inode: int
    block: int
    read_only: bool
    direct: bool


@contextlib.contextmanager
def attached(path: Path, *, read_only: bool = False) -> Iterator[Path]:
    """A new loop device over the file `path`; it lives until the block ends and nobody else has it open.

    Raises OSError.
    """
    backing = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        device, descriptor = _configured(path, backing, read_only)
    finally:
        os.close(backing)
    try:
        yield device
    finally:
        os.close(descriptor)


def status(device: Path) -> Status | None:
    """None when no file is attached to the loop device. Raises OSError."""
    with _opened(device) as descriptor:
        info = bytearray(_INFO.size)
        try:
            fcntl.ioctl(descriptor, _GET_STATUS64, info)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
    fields = _INFO.unpack(info)
    flags = fields[8]
    return Status(
        device=_device_number(fields[0]),
        inode=fields[1],
        block=_device_number(fields[2]),
        read_only=bool(flags & _READ_ONLY),
        direct=bool(flags & _DIRECT_IO),
    )


def grow(device: Path) -> None:
    """Let the loop device take the size its file has now (whole sectors of 512 bytes). Raises OSError."""
    with _opened(device) as descriptor:
        fcntl.ioctl(descriptor, _SET_CAPACITY)


def _configured(path: Path, backing: int, read_only: bool) -> tuple[Path, int]:
    """A free device, taken; and the descriptor that keeps it. Another process may take the free one before us."""
    flags = _AUTOCLEAR | _DIRECT_IO | (_READ_ONLY if read_only else 0)
    info = _INFO.pack(*[0] * 8, flags, os.fsencode(path)[:63], b"", b"", 0, 0)
    while True:
        device = _free()
        descriptor = os.open(device, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _CONFIGURE, _CONFIG.pack(backing, _SECTOR, info))
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EBUSY:
                raise
        else:
            return device, descriptor


def _free() -> Path:
    with _opened(_CONTROL, os.O_RDWR) as control:
        return Path(f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}")


def _device_number(encoded: int) -> int:
    """st_dev of what the kernel calls huge_encode_dev (include/linux/kdev_t.h)."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
