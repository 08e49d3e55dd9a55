"""fallocate(2), and whether a file system means what it answers."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from enum import IntEnum
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_BLOCK = 64 << 10
_PATTERN = b"\xa5" * _BLOCK


class Zeroing(IntEnum):
    """The two modes that make bytes read as zeros without writing them (linux/falloc.h; KEEP_SIZE is 1)."""

    ZERO_RANGE = 0x10
    PUNCH_HOLE = 0x02 | 0x01


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes, which os.posix_fallocate does not have. Raises OSError."""
    if _libc.fallocate64(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def leaves_old_data(directory: Path, mode: Zeroing) -> bool:
    """Whether the file system of `directory` answers success to `mode` and yet the old bytes can be read.

    GlusterFS 10 over FUSE does so for ZERO_RANGE. A file system that answers "not supported" is honest: qemu and the
    targets then write the zeros. Found out by doing it; raises OSError for what has other causes.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        fd = file.fileno()
        os.pwrite(fd, 3 * _PATTERN, 0)
        os.fsync(fd)
        try:
            fallocate(fd, mode, _BLOCK, _BLOCK)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            raise
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # ask the file system, not our page cache
        return os.pread(fd, 3 * _BLOCK, 0) != _PATTERN + bytes(_BLOCK) + _PATTERN
